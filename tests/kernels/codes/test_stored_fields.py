"""Packed fields as values, and their digests."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from strategies import random_packed

from reallm.kernels.codes.packing import pack_codes, pad
from reallm.kernels.codes.stored_fields import codes_sha256, fields_sha256, read_field
from reallm.kernels.formats.fields import Field
from reallm.kernels.formats.formats import Format

FIELDS = {"codes": np.arange(64, dtype=np.uint8), "scales": np.arange(128, dtype=np.uint8)[::-1].copy()}


@pytest.mark.parametrize(
    ("dtype", "raw", "values"),
    [
        ("u3", pack_codes(np.array([7, 0, 5]), 3), [7, 0, 5]),
        ("u16", pack_codes(np.array([65535, 1]), 16), [65535, 1]),
        ("u32", pad(np.array([2**32 - 1, 3], "<u4").tobytes()), [2**32 - 1, 3]),
        ("i8", pad(np.array([-128, 127], "i1").tobytes()), [-128, 127]),
        ("f16", pad(np.array([65504, -(2.0**-24)], "<f2").tobytes()), [65504, -(2.0**-24)]),
        ("bf16", pad(np.array([0x3FC0, 0xC000], "<u2").tobytes()), [1.5, -2]),
        ("f32", pad(np.array([2.0**-149, 3], "<f4").tobytes()), [2.0**-149, 3]),
    ],
)
def test_every_type_of_field_is_read_exactly(dtype: str, raw: np.ndarray, values: list[float]) -> None:
    assert read_field(Field("x", dtype, len(values)), {"x": raw}).tolist() == values


def test_digest_is_that_of_the_bytes_in_order() -> None:
    digest = fields_sha256(FIELDS)
    assert digest == hashlib.sha256(b"".join(value.tobytes() for value in FIELDS.values())).hexdigest()
    assert digest == fields_sha256({name: value.copy() for name, value in FIELDS.items()})
    assert digest != fields_sha256(dict(reversed(FIELDS.items())))
    changed = {**FIELDS, "codes": FIELDS["codes"] ^ np.uint8(1)}
    assert digest != fields_sha256(changed)


def test_digest_of_codes_takes_the_order_of_the_format() -> None:
    fmt = Format.parse("int4-g16+r2")
    packed = random_packed(fmt, 5, 33, seed=0)
    ordered = {field.name: packed[field.name] for field in fmt.fields(5, 33)}
    shuffled = dict(reversed(packed.items())) | {"unused": np.zeros(64, np.uint8)}
    assert codes_sha256(fmt, 5, 33, shuffled) == fields_sha256(ordered)
