"""Trainable low-rank factors of a packed matrix, and the way back into its bytes.

    y = x W(codes)^T + (x R^T) L^T        L [rows, rank], R [rank, cols] trainable; the codes stay as they are

As in LQ-LoRA (arXiv 2311.12023): the adapter is the low-rank term of the stored decomposition itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from reallm.decoding.decode import decode, decode_factors
from reallm.kernels.codes.packing import aligned, pack_codes
from reallm.kernels.formats.codecs import DenseCodec
from reallm.kernels.formats.formats import Format
from reallm.kernels.formats.terms import LowRank
from reallm.runtime.packed import DecodeMode, Packed


class LowRankTraining(Packed):
    """A packed matrix whose low-rank term can be trained."""

    left_factor: nn.Parameter | None
    right_factor: nn.Parameter | None

    def start_decoding(self, mode: DecodeMode, dtype: torch.dtype) -> None:
        """As for every packed matrix; no factors are being trained yet."""
        super().start_decoding(mode, dtype)
        self.register_parameter("left_factor", None)
        self.register_parameter("right_factor", None)

    def train_low_rank(self, rank: int | None = None, seed: int = 0) -> tuple[nn.Parameter, nn.Parameter]:
        """Make L [rows, rank] and R [rank, cols] trainable float32 parameters, from the stored term and on top of it.

        `rank` may exceed the stored rank; new components start with L = 0 and R ~ N(0, 1 / cols), so the weight does
        not change. Raises ValueError for a dense format, or a rank below the stored one.
        """
        stored = self.format.low_rank.rank if self.format.low_rank else 0
        rank = stored if rank is None else rank
        if isinstance(self.format.codec, DenseCodec) or rank < max(stored, 1):
            raise ValueError(f"format {self.format.name} cannot train a low-rank term of rank {rank}")
        left, right = decode_factors(self.format, self.fields, self.rows, self.cols)
        generator = torch.Generator().manual_seed(seed)
        fresh = torch.randn(rank - stored, self.cols, generator=generator).to(right.device) / self.cols**0.5
        self.left_factor = nn.Parameter(torch.cat([left, left.new_zeros(self.rows, rank - stored)], dim=1))
        self.right_factor = nn.Parameter(torch.cat([right, fresh]))
        self.forget()
        return self.left_factor, self.right_factor

    def fold(self, dtype: Literal["f16", "i8", "i4"] | None = None) -> Format:
        """Write the trained factors back into the fields, as `dtype` (default: as stored before, else f16).

        Returns the format, which has grown where the rank has. Raises ValueError if nothing is being trained or a
        factor is too large for fp16.
        """
        if self.left_factor is None or self.right_factor is None:
            raise ValueError("no low-rank factors are being trained; call train_low_rank() first")
        left, right = self.left_factor.detach().float(), self.right_factor.detach().float()
        kind = dtype or (self.format.low_rank.dtype if self.format.low_rank else "f16")
        term = LowRank(left.shape[1], kind)
        packed = pack_factors(left, right, term)
        self.left_factor = self.right_factor = None
        for name in ("left_scales", "right_scales"):
            self._buffers.pop(name, None)
        self.format = replace(self.format, low_rank=term)
        for name, raw in packed.items():
            self._buffers.pop(name, None)
            self.register_buffer(name, raw)
        self.forget()
        return self.format

    def add_low_rank(self, left: Tensor, right: Tensor) -> Format:
        """Store L [rows, rank] R [rank, cols] beside the term there is, both as fp16; the format has grown.

        Raises ValueError for a dense format, or a factor too large for fp16.
        """
        stored = self.format.low_rank.rank if self.format.low_rank else 0
        own_left, own_right = self.train_low_rank(stored + left.shape[1])
        with torch.no_grad():
            own_left[:, stored:] = left.to(own_left)
            own_right[stored:] = right.to(own_right)
        try:
            return self.fold("f16")
        finally:
            self.left_factor = self.right_factor = None

    @property
    def in_training(self) -> bool:
        """Whether factors are being trained."""
        return self.left_factor is not None

    def decode_now(self, dtype: torch.dtype) -> Tensor:
        """W_hat [rows, cols]; while its low-rank term is being trained, without that and without the gain."""
        if self.left_factor is None:
            return super().decode_now(dtype)
        fields, shared = self.fields, self.shared_codebooks
        return decode(self.format, fields, self.rows, self.cols, dtype=dtype, shared=shared, low_rank=False)

    def low_rank_output(self, inputs: Tensor) -> Tensor:
        """(x R^T) L^T for x [..., cols]: [..., rows]."""
        assert self.left_factor is not None and self.right_factor is not None
        inner = nn.functional.linear(inputs, self.right_factor.to(inputs.dtype))
        return nn.functional.linear(inner, self.left_factor.to(inputs.dtype))


def packed_bytes(values: Tensor) -> Tensor:
    """The bit pattern of `values`, zero-padded as a field: uint8 [aligned]."""
    raw = values.contiguous().reshape(-1).view(torch.uint8)
    result = raw.new_zeros(aligned(raw.numel()))
    result[: raw.numel()] = raw
    return result


def _rounded(factor: Tensor, dim: int, term: LowRank) -> tuple[Tensor, Tensor]:
    """Codes and fp16 scales of `factor`, one scale for each slice that `dim` is reduced away from."""
    largest = term.largest_code
    scales = (factor.abs().amax(dim=dim, keepdim=True) / largest).to(torch.float16)
    codes = (factor / scales.float().clamp(min=2.0**-24)).round().clamp(-largest, largest)
    if term.dtype == "i8":
        return packed_bytes(codes.to(torch.int8)), scales
    packed = pack_codes((codes + term.offset).nan_to_num().to(torch.uint8).cpu().numpy(), 4)
    return torch.from_numpy(packed).to(factor.device), scales


def pack_factors(left: Tensor, right: Tensor, term: LowRank) -> dict[str, Tensor]:
    """Fields of the low-rank term L [rows, rank] R [rank, cols] (float32) as uint8 tensors."""
    if term.dtype == "f16":
        codes, floats = {}, {"left": left.to(torch.float16), "right": right.to(torch.float16)}
    else:
        (left_codes, left_scales), (right_codes, right_scales) = _rounded(left, 0, term), _rounded(right, 1, term)
        codes = {"left": left_codes, "right": right_codes}
        floats = {"left_scales": left_scales, "right_scales": right_scales}
    if not all(bool(torch.isfinite(values).all()) for values in floats.values()):
        raise ValueError("a low-rank factor is not finite in fp16; train with a smaller learning rate")
    return codes | {name: packed_bytes(values) for name, values in floats.items()}
