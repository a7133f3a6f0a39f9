"""Between torch values and the bytes of a field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reallm.kernels.codes.packing import pack_codes, pad
from reallm.kernels.formats.codecs import Field

PackedFields = dict[str, NDArray[np.uint8]]


def store(field: Field, values: Tensor) -> NDArray[np.uint8]:
    """The bytes of `field` holding `values` (any shape with field.count entries).

    Raises ValueError for another number of values, a code out of range and a float that is too large for its field.
    """
    if values.numel() != field.count:
        raise ValueError(f"field {field.name!r} holds {field.count} values, not {values.numel()}")
    flat = values.detach().reshape(-1).contiguous().cpu()
    if field.dtype == "u32":
        return pad(flat.numpy().astype("<u4").view(np.uint8))
    if field.dtype[0] == "u":
        return pack_codes(flat.numpy().astype(np.uint16), int(field.dtype[1:]))
    if field.dtype == "bf16":
        return pad(flat.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint8))
    types = {"f16": torch.float16, "f32": torch.float32, "i8": torch.int8}
    stored = flat.to(types[field.dtype])
    if not bool(torch.isfinite(stored).all()):
        raise ValueError(f"field {field.name!r}: a value is not finite in {field.dtype}")
    return pad(stored.numpy().view(np.uint8))


def store_all(fields: Iterable[Field], values: Mapping[str, Tensor]) -> PackedFields:
    """The bytes of every field, in order."""
    return {field.name: store(field, values[field.name]) for field in fields}


def to_half(values: Tensor) -> Tensor:
    """Round to fp16 and back, clamped to its finite range: what a stored fp16 value will be."""
    return values.clamp(-65504.0, 65504.0).half().float()
