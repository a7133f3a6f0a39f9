"""The packed fields of a matrix as values, and their digests."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reallm.kernels.formats.fields import Field
from reallm.kernels.formats.formats import Format
from reallm.kernels.storage.dtypes import DTYPES

from .packing import check_packed, unpack_codes

Packed = Mapping[str, NDArray[np.uint8]]
"""Field name -> its bytes, padding included."""


def plain_values(body: NDArray[np.uint8], dtype: str) -> NDArray[Any]:
    """The numbers of type `dtype` ("f16", "u32", ...) in `body`, without padding; "bf16" as float32."""
    raw = np.ascontiguousarray(body)
    if dtype == "bf16":  # the upper half of a float32
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    name = DTYPES[dtype].numpy
    assert name
    return raw.view(name)


def check_field(field: Field, raw: NDArray[np.uint8]) -> None:
    """Raise ValueError unless `raw` has the size of `field` and its padding is zero."""
    if raw.dtype != np.uint8 or raw.shape != (field.nbytes,):
        raise ValueError(f"field {field.name!r} takes {field.nbytes} bytes, not {raw.dtype} {raw.shape}")
    if field.code_bits:
        check_packed(raw, field.code_bits, field.count)
    elif raw[DTYPES[field.dtype].nbytes(field.count) :].any():
        raise ValueError(f"padding of field {field.name!r} is not zero")


def is_finite(field: Field, raw: NDArray[np.uint8]) -> bool:
    """Whether `raw`, which `check_field` accepted, holds neither NaN nor infinity."""
    if field.code_bits:
        return True
    return bool(np.isfinite(plain_values(raw[: DTYPES[field.dtype].nbytes(field.count)], field.dtype)).all())


def read_field(field: Field, packed: Packed) -> NDArray[np.float64]:
    """The values of one field, float64 [field.count]; codes are whole numbers.

    Raises ValueError for a missing field, a wrong size and padding that is not zero.
    """
    if field.name not in packed:
        raise ValueError(f"field {field.name!r} is missing")
    raw = packed[field.name]
    check_field(field, raw)
    if field.code_bits:
        return unpack_codes(raw, field.code_bits, field.count).astype(np.float64)
    return plain_values(raw[: DTYPES[field.dtype].nbytes(field.count)], field.dtype).astype(np.float64)


def fields_sha256(fields: Packed) -> str:
    """Hex sha256 of the bytes of all fields, one after another in the order of the mapping."""
    digest = hashlib.sha256()
    for value in fields.values():
        digest.update(np.ascontiguousarray(value).data)
    return digest.hexdigest()


def codes_sha256(fmt: Format, rows: int, cols: int, fields: Packed) -> str:
    """`fields_sha256` of a matrix [rows, cols] in the file order of `fmt`, as tables and plans record it."""
    return fields_sha256({field.name: fields[field.name] for field in fmt.fields(rows, cols)})
