"""Random packed fields of any format, and error bounds of products, for the tests of kernels; needs no torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from consistent import consistent_fields
from numpy.typing import NDArray

from reallm.kernels.codes.hadamard import rotation
from reallm.kernels.codes.packing import pack_codes, pad, unpack_codes
from reallm.kernels.codes.trellis import CODE_UNIT
from reallm.kernels.formats.codecs import TILE, LatticeCodec, ScalarCodec, TrellisCodec
from reallm.kernels.formats.fields import Field
from reallm.kernels.formats.formats import Format
from reallm.kernels.reference import decode_reference
from reallm.kernels.storage.dtypes import DTYPES

Packed = dict[str, NDArray[np.uint8]]
UNIT = 2.0**-24
"""Largest relative error of a rounding to float32."""


def stored_fields(fmt: Format, rows: int, cols: int) -> tuple[Field, ...]:
    """All fields of a matrix [rows, cols], a shared codebook included."""
    return fmt.fields(rows, cols) + ((fmt.shared_field,) if fmt.shared_field else ())


def random_fields(fmt: Format, rows: int, cols: int, seed: int) -> Packed:
    """Random fields: every code equally likely, scales of both signs, positive parts of double-quantised scales."""
    rng = np.random.default_rng(seed)
    packed = {}
    for field in stored_fields(fmt, rows, cols):
        if field.dtype == "u32":
            continue  # `consistent_fields` has them
        if field.code_bits:
            packed[field.name] = pack_codes(rng.integers(0, 1 << field.code_bits, field.count), field.code_bits)
        elif field.dtype == "i8":
            packed[field.name] = pad(rng.integers(-127, 128, field.count).astype("i1").tobytes())
        else:
            values = rng.normal(scale=0.1, size=field.count)
            values = np.abs(values) if field.name in ("scale_min", "scale_ranges") else values
            packed[field.name] = pad(values.astype(DTYPES[field.dtype].numpy).tobytes())
    return packed | consistent_fields(fmt, rows, cols, rng)


def absolute_fields(fmt: Format, rows: int, cols: int, packed: Packed) -> Packed:
    """The same fields with the absolute values of all floats and factors, to which rounding errors are relative."""
    result = dict(packed)
    for field in stored_fields(fmt, rows, cols):
        if field.dtype[0] != "u":
            values = packed[field.name].view(DTYPES[field.dtype].numpy)
            result[field.name] = np.abs(values).view(np.uint8)
    return result


def coded_magnitudes(fmt: Format, rows: int, cols: int, packed: Packed) -> NDArray[np.float64]:
    """An upper bound of the sum of the magnitudes of the parts of each coded weight, [rows, cols]."""
    fields = absolute_fields(fmt, rows, cols, packed)
    if isinstance(fmt.codec, TrellisCodec | LatticeCodec):
        # a trellis sums codes of 0 to 1020 and subtracts the mean from the sum; words of e8p4 are at most 2.75 * 1.27
        largest = 1020 * CODE_UNIT if isinstance(fmt.codec, TrellisCodec) else 4.0
        scales = fields["scales"].view("<f2")[: -(-cols // TILE)].astype(np.float64)
        return np.broadcast_to(largest * scales.repeat(TILE)[:cols], (rows, cols))
    plain = np.abs(decode_reference(Format(fmt.codec), fields, rows, cols))
    codec = fmt.codec
    if isinstance(codec, ScalarCodec) and codec.table in ("int", "uint"):
        # sums of code * x minus zero * x: codes and zeros are below 2^bits; scales of int are divided by 2^(bits-1)
        largest = (2 << codec.bits) / (1 if codec.table == "uint" else 1 << (codec.bits - 1))
        ones = pack_codes(np.ones(rows * cols, np.int64), codec.bits)
        zeros = {"zeros": pack_codes(np.zeros(rows * codec.group_count(cols), np.int64), codec.bits)}
        scales = decode_reference(Format(replace(codec, table="uint")), {**fields, **zeros, "codes": ones}, rows, cols)
        return np.maximum(plain, largest * scales)
    return plain


def product_bound(
    fmt: Format,
    rows: int,
    cols: int,
    packed: Packed,
    x: NDArray[np.floating],
    half: bool = False,
    decoded: bool = False,
) -> NDArray[np.float64]:
    """Error bound of x W_hat^T of a transformed or sparse format in float32, [batch, rows]; see `sum_bound`.

    Each of the three linear maps (rotation of x, codes, rotation of the sums) propagates the error of the one before
    and adds at most (terms + 16) u times the sum of the magnitudes of its terms. `half`: the product x' scale of a
    trellis is rounded to half precision, with an error of 2^-11 of itself plus 2^-24 of the largest scale and of norm,
    which is at most the largest entry of x. `decoded`: x' and the decoded values are rounded to half precision, for a
    trellis in units of the largest scale; for other codecs each by 2^-11 of itself or 2^-25, x' in units of norm.
    """
    z = np.abs(x).astype(np.float64)
    z = z * packed["channel_scales"].view("<f2")[:cols] if fmt.channel_scales else z
    z = z[:, unpack_codes(packed["permutation"], 16, cols)] if fmt.permuted else z
    turn_in = np.abs(rotation(cols)) if fmt.rotated else np.eye(cols)
    turn_out = np.abs(rotation(rows)) if fmt.rotated else np.eye(rows)
    coded = coded_magnitudes(fmt, rows, cols, packed)
    ready = z @ turn_in.T
    error = (cols + 16) * UNIT * ready @ coded.T + (cols + 40) * UNIT * ready @ coded.T
    if half and not isinstance(fmt.codec, TrellisCodec):
        error = error + ready @ (1.001 * 2.0**-10 * coded + 2.0**-24).T
        error = error + 2.0**-24 * z.max(1, keepdims=True) * coded.sum(1)
    elif half:
        largest = np.abs(packed["scales"].view("<f2")[: -(-cols // TILE)].astype(np.float64)).max()
        floor = 2.0**-24 * 2 * largest * z.max(1, keepdims=True) * 1020 * CODE_UNIT * cols
        error = error + 2.0**-11 * ready @ coded.T + floor
    if decoded and isinstance(fmt.codec, TrellisCodec):
        largest = 2 * np.abs(packed["scales"].view("<f2")[: -(-cols // TILE)].astype(np.float64)).max()
        error = error + 1.001 * 2.0**-10 * ready @ coded.T + 2.0**-24 * largest * ready.sum(1, keepdims=True)
        error = error + 2.0**-24 * z.max(1, keepdims=True) * coded.sum(1)
    error = error @ turn_out + (rows + 16) * UNIT * (ready @ coded.T) @ turn_out
    rest = replace(fmt, rotated=False, permuted=False, channel_scales=False)
    plain = replace(rest, low_rank=None, sparse=None)
    fields = absolute_fields(rest, rows, cols, packed)
    added = np.abs(decode_reference(rest, fields, rows, cols) - decode_reference(plain, fields, rows, cols))
    if fmt.low_rank and fmt.low_rank.dtype == "i4":
        added = added + low_rank_i4(rows, cols, fmt.low_rank.rank, packed)
    terms = cols + (fmt.low_rank.rank if fmt.low_rank else 0) + 40
    return error + terms * UNIT * (np.abs(x) @ added.T + (ready @ coded.T) @ turn_out)


def low_rank_i4(rows: int, cols: int, rank: int, packed: Packed) -> NDArray[np.float64]:
    """An upper bound of the sum of the magnitudes of products of int4 factors, [rows, cols]: codes are -8 to 7."""
    scales = [np.abs(packed[name].view("<f2")[:rank].astype(np.float64)) for name in ("left_scales", "right_scales")]
    return np.full((rows, cols), 64.0 * float(scales[0] @ scales[1]))


def sum_bound(fmt: Format, rows: int, cols: int, packed: Packed, x: NDArray[np.floating]) -> NDArray[np.float64]:
    """Error bound of x W_hat^T computed in float32, [batch, rows].

    A sum of n products has an error of at most n u times the sum of their magnitudes, in any order of summation
    (Higham, Accuracy and Stability, 3.1), with u = 2^-24. Here n is K, plus the rank, plus 12 for the roundings within
    one decoded weight and after the sum. The magnitude of a weight is the sum of the magnitudes of its parts: words of
    codebooks and products of factors.
    """
    fields = absolute_fields(fmt, rows, cols, packed)
    plain = decode_reference(Format(fmt.codec), fields, rows, cols)
    magnitudes = coded_magnitudes(fmt, rows, cols, packed) + (decode_reference(fmt, fields, rows, cols) - plain)
    rank = fmt.low_rank.rank if fmt.low_rank else 0
    bound: NDArray[np.float64] = (cols + rank + 12) * 2.0**-24 * (np.abs(x).astype(np.float64) @ magnitudes.T)
    return bound
