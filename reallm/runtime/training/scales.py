"""Trainable scales and codebooks of a packed matrix, and the way back into its bytes: not one byte more.

    y = T(codes * (scales * gain)) x + L R x        gain, one a stored scale, starts at 1; the codes stay as they are

Tuning scales beside norms is what block-wise methods do after their codes are fixed (AQLM, arXiv 2401.06118; OmniQuant,
arXiv 2308.13137). Where all rows share their scales, as in rotated trellis codes, they multiply the rotated input, so
that no gradient of a whole weight is ever formed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from reallm.decoding.decode import (
    codebook_field,
    decode_coded,
    decode_factors,
    decode_scales,
    decode_transform,
    read_floats,
    scale_count,
    spread_scales,
)
from reallm.decoding.rotation import rotate, unrotate
from reallm.kernels.formats.codecs import AdditiveCodec, Field, KMeansCodec, ScalarCodec
from reallm.kernels.formats.formats import Format
from reallm.runtime.packed import DecodeMode

from .codebook import TrainedCodebook
from .low_rank import LowRankTraining, packed_bytes


class ScaleTraining(LowRankTraining):
    """A packed matrix whose scales and codebook can be trained, beside its low-rank term."""

    scale_gain: nn.Parameter | None
    codebook: TrainedCodebook | None
    _lent: tuple[TrainedCodebook, ...]
    """The trained codebook that this matrix shares with others; in a tuple, so that it is no child of one of them."""
    _scales: Tensor | None
    _coded: Tensor | None

    def start_decoding(self, mode: DecodeMode, dtype: torch.dtype) -> None:
        """As for every packed matrix; nothing is being trained yet."""
        super().start_decoding(mode, dtype)
        self.register_parameter("scale_gain", None)
        self.register_module("codebook", None)
        self._scales = self._coded = None
        self._lent = ()

    @property
    def has_scales(self) -> bool:
        """Whether there are scales to train."""
        return scale_count(self.format, self.rows, self.cols) > 0

    def train_scales(self) -> nn.Parameter:
        """Make a gain on every stored scale trainable, float32 ones [count]. Raises ValueError where there is none."""
        if not self.has_scales:
            raise ValueError(f"format {self.format.name} stores no scales by themselves, so there are none to train")
        self._scales = decode_scales(self.format, self.fields, self.rows, self.cols)  # no buffer, so it is not saved
        self.scale_gain = nn.Parameter(torch.ones_like(self._scales))
        self.forget()
        return self.scale_gain

    @property
    def codebook_field(self) -> Field | None:
        """The field of fp16 values that codes choose among, this matrix's own or shared; None where there is none."""
        return codebook_field(self.format, self.rows, self.cols)

    def train_codebook(self, lent: TrainedCodebook | None = None) -> TrainedCodebook:
        """Make the codebook trainable; one that is shared comes from a matrix that has it already.

        Raises ValueError for a format without one.
        """
        field = self.codebook_field
        if field is None:
            raise ValueError(f"format {self.format.name} has no codebook of its own, so there is none to train")
        if lent is None:
            raw = self.fields.get(field.name, self.shared_codebooks)
            assert raw is not None
            tables = self.rows if isinstance(self.format.codec, KMeansCodec) else 1
            lent = TrainedCodebook(read_floats(raw, field.dtype, field.count), tables)
        if field.name in self.fields:
            self.codebook = lent
        else:
            self._lent = (lent,)
        self._coded = None
        self.forget()
        return lent

    @property
    def trained_codebook(self) -> TrainedCodebook | None:
        """The one being trained, own or shared."""
        return self._lent[0] if self._lent else self.codebook

    def fold_codebook(self) -> None:
        """Write a trained codebook of its own back into its field; one that is shared is its holder's to write.

        Raises ValueError if a value is not finite in fp16.
        """
        own, field = self.codebook, self.codebook_field
        values = None if own is None else own.rounded()
        self.codebook, self._lent, self._coded = None, (), None
        if values is not None and field is not None:
            self.write([(field.name, packed_bytes(values))])
        self.forget()

    def _codes(self) -> Tensor:
        """What the scales multiply, [rows, cols] in the compute dtype; of a rotated matrix back in its rows' places."""
        if (book := self.trained_codebook) is not None:
            fields, shared = self.fields, self.shared_codebooks
            return decode_coded(self.format, fields, self.rows, self.cols, shared=shared, codebook=book())
        if self._coded is not None:
            return self._coded
        with torch.inference_mode(False), torch.no_grad():
            coded = decode_coded(self.format, self.fields, self.rows, self.cols, shared=self.shared_codebooks)
            if self._by_vector and self.format.rotated:
                coded = unrotate(coded.T.contiguous()).T.contiguous()
            coded = coded.to(self.decoded.dtype)
        if self.mode == "load":
            self._coded = coded
        return coded

    def fold_scales(self) -> None:
        """Write the trained scales back into their field.

        Raises ValueError if they are not being trained or one is not finite in fp16.
        """
        if self.scale_gain is None or self._scales is None:
            raise ValueError("no scales are being trained; call train_scales() first")
        scales = (self._scales * self.scale_gain.detach()).to(torch.float16)
        if not bool(scales.isfinite().all()):
            raise ValueError("a scale is not finite in fp16; train with a smaller learning rate")
        self.scale_gain = self._scales = self._coded = None
        self.write([("scales", packed_bytes(scales))])
        self.forget()

    def revert(self, fmt: Format, fields: dict[str, Tensor]) -> None:
        """Give up whatever is being trained, and take on a format and its fields."""
        self.left_factor = self.right_factor = self.scale_gain = self._scales = self._coded = self.codebook = None
        self._lent = ()
        for name in self.fields:
            self._buffers.pop(name, None)
        self.format = fmt
        for name, raw in fields.items():
            self.register_buffer(name, raw.clone())
        self.forget()

    @property
    def in_training(self) -> bool:
        """Whether factors, scales or a codebook are being trained."""
        return self.left_factor is not None or self._values_in_training

    @property
    def _values_in_training(self) -> bool:
        return self.scale_gain is not None or self.trained_codebook is not None

    def training_output(self, inputs: Tensor) -> Tensor:
        """x W_hat^T for x [..., cols], with what is being trained in it: [..., rows]."""
        if not self._values_in_training:
            result = linear(inputs, self.dense(inputs.dtype))
        else:
            result = self._scaled_output(inputs)
            if self.left_factor is None and self.format.low_rank:
                left, right = decode_factors(self.format, self.fields, self.rows, self.cols)
                result = result + linear(linear(inputs, right.to(inputs.dtype)), left.to(inputs.dtype))
        return result if self.left_factor is None else result + self.low_rank_output(inputs)

    def _scaled_output(self, inputs: Tensor) -> Tensor:
        fmt, coded = self.format, self._codes().to(inputs.dtype)
        spread = self._spread_scales().to(inputs.dtype)
        if not self._by_vector:
            weight = decode_transform(fmt, self.fields, self.rows, self.cols, (coded * spread).float())
            return linear(inputs, weight.to(inputs.dtype))
        return linear((rotate(inputs) if fmt.rotated else inputs) * spread, coded)

    def _spread_scales(self) -> Tensor:
        """The scales as they are now and as they multiply the codes; one where the format stores none by themselves."""
        if not self.has_scales:
            return torch.ones((), device=self.decoded.device)
        scales = self._scales
        if scales is None:
            scales = decode_scales(self.format, self.fields, self.rows, self.cols)
        if self.scale_gain is not None:
            scales = scales * self.scale_gain
        return spread_scales(self.format, scales, self.rows, self.cols)

    @property
    def _by_vector(self) -> bool:
        """Whether the scales multiply the (rotated) input, which needs no weight to be formed."""
        fmt = self.format
        by_row = isinstance(fmt.codec, ScalarCodec | AdditiveCodec | KMeansCodec)
        return not (by_row or fmt.sparse or fmt.permuted or fmt.channel_scales)
