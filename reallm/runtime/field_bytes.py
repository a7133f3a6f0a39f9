"""Convert values to the bytes of packed fields: fp16 values and low-rank factors."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from reallm.decoding.decode import decode_factors
from reallm.kernels.codes.packing import pack_codes
from reallm.kernels.formats.codecs import DenseCodec
from reallm.kernels.formats.terms import LowRank
from reallm.kernels.storage.alignment import aligned

from .packed import Packed


def packed_bytes(values: Tensor) -> Tensor:
    """The bytes of `values`, uint8 [nbytes], zero-padded to the aligned size of a field."""
    raw = values.contiguous().reshape(-1).view(torch.uint8)
    result = raw.new_zeros(aligned(raw.numel()))
    result[: raw.numel()] = raw
    return result


def pack_factors(left: Tensor, right: Tensor, term: LowRank) -> dict[str, Tensor]:
    """Pack L [rows, rank] and R [rank, cols] (float32) into the fields of `term`, each uint8 [nbytes].

    Raises ValueError if a factor, or a scale of a factor, is not finite in fp16.
    """
    if term.dtype == "f16":
        codes, floats = {}, {"left": left.to(torch.float16), "right": right.to(torch.float16)}
    else:
        (left_codes, left_scales), (right_codes, right_scales) = _quantised(left, 0, term), _quantised(right, 1, term)
        codes = {"left": left_codes, "right": right_codes}
        floats = {"left_scales": left_scales, "right_scales": right_scales}
    if not all(bool(torch.isfinite(values).all()) for values in floats.values()):
        raise ValueError("a low-rank factor is not finite in fp16; train with a smaller learning rate")
    return codes | {name: packed_bytes(values) for name, values in floats.items()}


def _quantised(factor: Tensor, dim: int, term: LowRank) -> tuple[Tensor, Tensor]:
    """Packed codes and fp16 scales of `factor`, with one scale for each slice along `dim`."""
    largest = term.largest_code
    scales = (factor.abs().amax(dim=dim, keepdim=True) / largest).to(torch.float16)
    codes = (factor / scales.float().clamp(min=2.0**-24)).round().clamp(-largest, largest)
    if term.dtype == "i8":
        return packed_bytes(codes.to(torch.int8)), scales
    packed = pack_codes((codes + term.offset).nan_to_num().to(torch.uint8).cpu().numpy(), 4)
    return torch.from_numpy(packed).to(factor.device), scales


def store_factors(packed: Packed, left: Tensor, right: Tensor, term: LowRank) -> None:
    """Make L [rows, rank] R [rank, cols] the low-rank term of `packed`, whose format gets `term`.

    Raises ValueError, and leaves `packed` as it was, for a dense format or a factor that is not finite in fp16.
    """
    if isinstance(packed.format.codec, DenseCodec):
        raise ValueError(f"format {packed.format.name} cannot have a low-rank term")
    replaced = pack_factors(left, right, term)
    fmt = replace(packed.format, low_rank=term)
    names = [field.name for field in fmt.fields(packed.rows, packed.cols)]
    packed.replace_fields(fmt, {name: packed.fields[name] for name in names if name not in replaced} | replaced)


def add_low_rank(packed: Packed, left: Tensor, right: Tensor) -> None:
    """Add L [rows, rank] R [rank, cols] to the low-rank term of `packed`; its rank grows by `rank`, and it becomes
    fp16.

    Raises ValueError in the same cases as `store_factors`.
    """
    stored_left, stored_right = decode_factors(packed.format, packed.fields, packed.rows, packed.cols)
    left, right = torch.cat([stored_left, left.to(stored_left)], 1), torch.cat([stored_right, right.to(stored_right)])
    store_factors(packed, left, right, LowRank(left.shape[1], "f16"))
