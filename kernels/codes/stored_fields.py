"""The packed fields of a matrix as values, and their digests."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from reallm.kernels.formats.fields import Field
from reallm.kernels.formats.formats import Format
from reallm.kernels.storage.dtypes import DTYPES

from .packing import unpack_codes

Packed = Mapping[str, NDArray[np.uint8]]
"""Field name -> its bytes, padding included."""


def read_field(field: Field, packed: Packed) -> NDArray[np.float64]:
    """The values of one field, float64 [field.count]; codes are whole numbers.

    Raises ValueError for a missing field, a wrong size and padding that is not zero.
    """
    if field.name not in packed:
        raise ValueError(f"field {field.name!r} is missing")
    raw = packed[field.name]
    if raw.dtype != np.uint8 or raw.shape != (field.nbytes,):
        raise ValueError(f"field {field.name!r} takes {field.nbytes} bytes, not {raw.dtype} {raw.shape}")
    if field.code_bits:
        return unpack_codes(raw, field.code_bits, field.count).astype(np.float64)
    dtype = DTYPES[field.dtype]
    used = dtype.nbytes(field.count)
    if raw[used:].any():
        raise ValueError(f"padding of field {field.name!r} is not zero")
    body = np.ascontiguousarray(raw[:used])
    if field.dtype == "bf16":  # the upper half of a float32
        return (body.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    assert dtype.numpy
    return body.view(dtype.numpy).astype(np.float64)


def fields_sha256(fields: Packed) -> str:
    """Hex sha256 of the bytes of all fields, one after another in the order of the mapping."""
    digest = hashlib.sha256()
    for value in fields.values():
        digest.update(np.ascontiguousarray(value).data)
    return digest.hexdigest()


def codes_sha256(fmt: Format, rows: int, cols: int, fields: Packed) -> str:
    """`fields_sha256` of a matrix [rows, cols] in the file order of `fmt`, as tables and plans record it."""
    return fields_sha256({field.name: fields[field.name] for field in fmt.fields(rows, cols)})
