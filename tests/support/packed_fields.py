"""Random packed fields of any format, for the tests of kernels; imports neither torch nor triton."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from reallm.kernels.codecs import Field
from reallm.kernels.formats import Format
from reallm.kernels.packing import pack_codes, pad
from reallm.kernels.reference import decode_reference

Packed = dict[str, NDArray[np.uint8]]
DTYPES = {"f16": "<f2", "f32": "<f4", "i8": "i1"}


def stored_fields(fmt: Format, rows: int, cols: int) -> tuple[Field, ...]:
    """All fields, a shared codebook included."""
    return fmt.fields(rows, cols) + ((fmt.shared_field,) if fmt.shared_field else ())


def random_fields(fmt: Format, rows: int, cols: int, seed: int) -> Packed:
    """Every code equally likely; scales of both signs, or positive parts where they are double-quantised."""
    rng = np.random.default_rng(seed)
    packed = {}
    for field in stored_fields(fmt, rows, cols):
        if field.dtype[0] == "u":
            bits = int(field.dtype[1:])
            packed[field.name] = pack_codes(rng.integers(0, 1 << bits, field.count), bits)
        elif field.dtype == "i8":
            packed[field.name] = pad(rng.integers(-127, 128, field.count).astype("i1").tobytes())
        else:
            values = rng.normal(scale=0.1, size=field.count)
            values = np.abs(values) if field.name in ("scale_min", "scale_ranges") else values
            packed[field.name] = pad(values.astype(DTYPES[field.dtype]).tobytes())
    return packed


def absolute_fields(fmt: Format, rows: int, cols: int, packed: Packed) -> Packed:
    """The same fields with the sign taken off every stored float and factor: what rounding errors are relative to."""
    result = dict(packed)
    for field in stored_fields(fmt, rows, cols):
        if field.dtype[0] != "u":
            values = packed[field.name].view(DTYPES[field.dtype])
            result[field.name] = np.abs(values).view(np.uint8)
    return result


def sum_bound(fmt: Format, rows: int, cols: int, packed: Packed, x: NDArray[np.floating]) -> NDArray[np.float64]:
    """By how much x W_hat^T in float32 may be off, [batch, rows].

    A sum of n products is off by at most n u of the sum of their magnitudes, whatever the order (Higham, Accuracy and
    Stability, 3.1), u = 2^-24: n is K, the rank, and 12 for the roundings inside one decoded weight and after the sum.
    The magnitude of a weight is the sum of those of its parts: words of codebooks and products of factors.
    """
    fields = absolute_fields(fmt, rows, cols, packed)
    plain = decode_reference(Format(fmt.codec), fields, rows, cols)
    magnitudes = np.abs(plain) + (decode_reference(fmt, fields, rows, cols) - plain)
    rank = fmt.low_rank.rank if fmt.low_rank else 0
    bound: NDArray[np.float64] = (cols + rank + 12) * 2.0**-24 * (np.abs(x).astype(np.float64) @ magnitudes.T)
    return bound
