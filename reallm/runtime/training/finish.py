"""End the training of a packed linear module: write the trained values into its fields, or discard them.

The module's TrainingPart is removed when none of its parameters is being trained any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from reallm.decoding.scales import codebook_field
from reallm.kernels.formats.formats import Format
from reallm.kernels.formats.terms import LowRank
from reallm.runtime.field_bytes import packed_bytes, store_factors
from reallm.runtime.modules import CompressedLinear
from reallm.runtime.row_magnitudes import set_magnitudes


def _remove_if_idle(linear: CompressedLinear) -> None:
    if linear.training_part is not None and linear.training_part.is_idle:
        linear.training_part = None
    linear.drop_cache()


def write_back_low_rank(linear: CompressedLinear, dtype: Literal["f16", "i8", "i4"] | None = None) -> Format:
    """Store the trained factors as `dtype` (default: that of the stored term, or f16) and return the new format.

    A trained magnitude becomes the gain of the rows, which is in memory only. Raises ValueError if no factors are
    being trained, a factor does not fit into fp16, or a gain is not finite.
    """
    part = linear.training_part
    if part is None or part.left_factor is None or part.right_factor is None:
        raise ValueError("no low-rank factors are being trained; call train_low_rank() first")
    left, right, magnitude = part.left_factor.detach().float(), part.right_factor.detach().float(), part.magnitude
    stored = linear.format.low_rank
    part.magnitude = None
    store_factors(linear, left, right, LowRank(left.shape[1], dtype or (stored.dtype if stored else "f16")))
    part.left_factor = part.right_factor = None
    _remove_if_idle(linear)
    if magnitude is not None:
        set_magnitudes(linear, magnitude)
    return linear.format


def write_back_scales(linear: CompressedLinear) -> None:
    """Store the trained scales.

    Raises ValueError if no scales are being trained, or one is not finite in fp16.
    """
    part = linear.training_part
    if part is None or part.scale_gain is None or part.stored_scales is None:
        raise ValueError("no scales are being trained; call train_scales() first")
    scales = (part.stored_scales * part.scale_gain.detach()).to(torch.float16)
    if not bool(scales.isfinite().all()):
        raise ValueError("a scale is not finite in fp16; train with a smaller learning rate")
    part.scale_gain = part.stored_scales = None
    part.scaled_product.drop_cache()
    linear.write([("scales", packed_bytes(scales))])
    _remove_if_idle(linear)


def write_back_codebook(linear: CompressedLinear) -> None:
    """Store the matrix's own trained codebook. A shared codebook is not written, but only detached from the matrix.

    Raises ValueError if a value is not finite in fp16.
    """
    part, field = linear.training_part, codebook_field(linear.format, linear.rows, linear.cols)
    if part is None or field is None:
        return
    values = None if part.codebook is None else part.codebook.rounded()
    part.set_codebook(None)
    if values is not None:
        linear.write([(field.name, packed_bytes(values))])
    _remove_if_idle(linear)


def revert(linear: CompressedLinear, fmt: Format, fields: Mapping[str, Tensor]) -> None:
    """Discard everything that is being trained and the gain, and set the format `fmt` and copies of its `fields`."""
    linear.training_part = None
    linear.set_gain(None)
    linear.replace_fields(fmt, {name: raw.clone() for name, raw in fields.items()})
