"""Packing: from values in torch tensors to the bytes of a field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reallm.kernels.codes.packing import pack_codes, pad
from reallm.kernels.formats.fields import Field
from reallm.system.torch_dtypes import TORCH_DTYPES

PackedFields = dict[str, NDArray[np.uint8]]
"""The bytes of each field of a matrix, by field name."""


def store(field: Field, values: Tensor) -> NDArray[np.uint8]:
    """Pack `values`, of any shape with field.count entries, into the bytes of `field`.

    Raises ValueError for a wrong number of values, a code out of range, and a float that the field's type cannot hold.
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
    stored = flat.to(TORCH_DTYPES[field.dtype])
    if not bool(torch.isfinite(stored).all()):
        raise ValueError(f"field {field.name!r}: a value is not finite in {field.dtype}")
    return pad(stored.numpy().view(np.uint8))


def store_all(fields: Iterable[Field], values: Mapping[str, Tensor]) -> PackedFields:
    """Pack the values of every field, in the order of `fields`."""
    return {field.name: store(field, values[field.name]) for field in fields}


def to_half(values: Tensor) -> Tensor:
    """Clamp `values` to the finite range of fp16, round them to fp16 and convert back, as storing and reading would."""
    return values.clamp(-65504.0, 65504.0).half().float()
