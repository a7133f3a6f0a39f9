"""Decoding for fine-tuning: the unscaled codes, the scales and the codebook as separate tensors.

Fine-tuning multiplies the codes by the scales itself, so that gradients reach the scales and the codebook:

    decoded codes = decode_unscaled(...) * spread_scales(decode_scales(...))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from reallm.kernels.formats.codecs import (
    TILE,
    AdditiveCodec,
    AnyCodec,
    DenseCodec,
    KMeansCodec,
    LatticeCodec,
    NeuralCodec,
    ScalarCodec,
    TrellisCodec,
)
from reallm.kernels.formats.fields import Field
from reallm.kernels.formats.formats import Format

from .codec_decoders import spread_groups
from .decode import decode_codes, fields_with_shared
from .field_reader import FieldReader, Fields
from .unpack import read_floats


def decode_unscaled(
    fmt: Format,
    fields: Fields,
    rows: int,
    cols: int,
    *,
    shared: Tensor | None = None,
    codebook: Tensor | None = None,
) -> Tensor:
    """Decode the codes as if every fp16 scale were one, before transforms are undone: float32 [rows, cols].

    `codebook`, float32 [count], replaces the stored values of `codebook_field`; the result is differentiable in it.
    Raises ValueError for a missing field or a field of a wrong size.
    """
    stored, fields = fields_with_shared(fmt, fields, rows, cols, shared)
    count, device = scale_count(fmt, rows, cols), next(iter(fields.values())).device
    overrides = {"scales": torch.ones(count, device=device)} if count else {}
    field = codebook_field(fmt, rows, cols)
    if codebook is not None and field is not None:
        overrides[field.name] = codebook
    return decode_codes(fmt, FieldReader(stored, fields, rows, None, overrides), rows, cols)


def codebook_field(fmt: Format, rows: int, cols: int) -> Field | None:
    """The field with the table of fp16 values that codes index, which may be shared; None if the codec has none."""
    if isinstance(fmt.codec, AdditiveCodec):
        return fmt.codec.codebook_field()
    if isinstance(fmt.codec, KMeansCodec):
        return next(field for field in fmt.fields(rows, cols) if field.name == "levels")
    return None


def scale_count(fmt: Format, rows: int, cols: int) -> int:
    """The number of fp16 scales in the matrix; 0 if the codec has no scales or stores them double-quantised."""
    return next((field.count for field in fmt.fields(rows, cols) if field.name == "scales"), 0)


def decode_scales(fmt: Format, fields: Fields, rows: int, cols: int) -> Tensor:
    """The stored fp16 scales as float32 [count]."""
    return read_floats(fields["scales"], "f16", scale_count(fmt, rows, cols))


def spread_scales(fmt: Format, scales: Tensor, rows: int, cols: int) -> Tensor:
    """Expand scales [count] to a shape that can be multiplied with the codes [rows, cols].

    The result is [rows, cols] for scales per group, [rows, 1] for scales per row, and [cols] where all rows have the
    same scales. Raises ValueError for a codec without scales.
    """
    spread = SCALE_SPREADS[type(fmt.codec)]
    if spread is None:
        raise ValueError(f"format {fmt.name} has no scales")
    return spread(fmt.codec, scales, rows, cols)


def _per_group(codec: ScalarCodec, scales: Tensor, rows: int, cols: int) -> Tensor:
    return spread_groups(scales.view(rows, -1), codec.group_width(cols), cols)


def _per_row(codec: AdditiveCodec, scales: Tensor, rows: int, cols: int) -> Tensor:
    return scales[:, None]


def _per_column_block(codec: AnyCodec, scales: Tensor, rows: int, cols: int) -> Tensor:
    return scales.repeat_interleave(TILE)[:cols]


SCALE_SPREADS: Mapping[type[AnyCodec], Callable[[Any, Tensor, int, int], Tensor] | None] = {
    DenseCodec: None,
    ScalarCodec: _per_group,
    KMeansCodec: None,
    AdditiveCodec: _per_row,
    LatticeCodec: _per_column_block,
    TrellisCodec: _per_column_block,
    NeuralCodec: _per_column_block,
}
"""For each codec, the function that expands its scales as `spread_scales` does; None for codecs without scales."""
