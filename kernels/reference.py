"""The independent decode: packed bytes to float64 weights, in numpy, written for clarity.

Every other decoder (torch, Triton, C++) is tested against this one. Formulas: see `formats` for each codec.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from .codes.hadamard import rotation
from .codes.lattice import decode_lattice
from .codes.neural import decode_neural
from .codes.packing import unpack_codes
from .codes.tables import table
from .codes.trellis import decode_trellis
from .formats.codecs import (
    TILE,
    AdditiveCodec,
    DenseCodec,
    Field,
    KMeansCodec,
    LatticeCodec,
    NeuralCodec,
    ScalarCodec,
    TrellisCodec,
)
from .formats.formats import Format
from .formats.terms import LowRank

Packed = Mapping[str, NDArray[np.uint8]]
Array = NDArray[np.float64]


def read_field(field: Field, packed: Packed) -> Array:
    """The values of one field as float64 [field.count]; codes as whole numbers.

    Raises ValueError on a missing field, a wrong size or padding that is not zero.
    """
    if field.name not in packed:
        raise ValueError(f"field {field.name!r} is missing")
    raw = packed[field.name]
    if raw.dtype != np.uint8 or raw.shape != (field.nbytes,):
        raise ValueError(f"field {field.name!r} takes {field.nbytes} bytes, not {raw.dtype} {raw.shape}")
    if field.dtype[0] == "u" and field.dtype != "u32":
        return unpack_codes(raw, int(field.dtype[1:]), field.count).astype(np.float64)
    width = {"f16": 2, "bf16": 2, "f32": 4, "i8": 1, "u32": 4}[field.dtype]
    if raw[field.count * width :].any():
        raise ValueError(f"padding of field {field.name!r} is not zero")
    body = np.ascontiguousarray(raw[: field.count * width])
    if field.dtype == "bf16":
        return (body.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return body.view({"f16": "<f2", "f32": "<f4", "i8": "i1", "u32": "<u4"}[field.dtype]).astype(np.float64)


def _scalar(codec: ScalarCodec, values: dict[str, Array], rows: int, cols: int) -> Array:
    groups = codec.group_count(cols)
    owner = np.arange(cols) // codec.group_width(cols)
    codes = values["codes"].reshape(rows, cols).astype(np.int64)
    if codec.double_quant is None:
        scales = values["scales"]
    else:
        block = np.arange(rows * groups) // codec.double_quant.block
        steps = 2**codec.double_quant.bits - 1
        scales = values["scale_min"][0] + values["scale_codes"] / steps * values["scale_ranges"][block]
    scales = scales.reshape(rows, groups)[:, owner]
    if codec.table == "uint":
        zeros = values["zeros"].reshape(rows, groups)[:, owner]
        return (codes - zeros) * scales
    return table(codec.table, codec.bits).astype(np.float64)[codes] * scales


def _additive(codec: AdditiveCodec, values: dict[str, Array], rows: int, cols: int) -> Array:
    groups = codec.group_count(cols)
    codes = values["codes"].reshape(rows, groups, codec.num_codebooks).astype(np.int64)
    books = values["codebooks"].reshape(codec.num_codebooks, 1 << codec.codebook_bits, codec.dim)
    words = sum(books[m][codes[:, :, m]] for m in range(codec.num_codebooks))
    assert isinstance(words, np.ndarray)
    weights: Array = words.reshape(rows, groups * codec.dim)[:, :cols] * values["scales"][:, None]
    return weights


def _kmeans(codec: KMeansCodec, values: dict[str, Array], rows: int, cols: int) -> Array:
    codes = values["codes"].reshape(rows, cols).astype(np.int64)
    return np.take_along_axis(values["levels"].reshape(rows, 1 << codec.bits), codes, axis=1)


def _trellis(codec: TrellisCodec, values: dict[str, Array], rows: int, cols: int) -> Array:
    plain = decode_trellis(codec, values["words"].astype(np.uint32), values["widths"].astype(np.int64), rows, cols)
    weights: Array = plain * values["scales"].repeat(TILE)[:cols]
    return weights


def _lattice(codec: LatticeCodec, values: dict[str, Array], rows: int, cols: int) -> Array:
    second = values["residuals"].astype(np.int64) if codec.bits > 2 else None
    words = decode_lattice(codec.bits, values["codes"].astype(np.int64), second)
    weights: Array = words.reshape(rows, -1)[:, :cols] * values["scales"].repeat(TILE)[:cols]
    return weights


def _codes(fmt: Format, values: dict[str, Array], rows: int, cols: int) -> Array:
    codec = fmt.codec
    if isinstance(codec, ScalarCodec):
        return _scalar(codec, values, rows, cols)
    if isinstance(codec, AdditiveCodec):
        return _additive(codec, values, rows, cols)
    if isinstance(codec, KMeansCodec):
        return _kmeans(codec, values, rows, cols)
    if isinstance(codec, LatticeCodec):
        return _lattice(codec, values, rows, cols)
    if isinstance(codec, NeuralCodec):
        codes, raw = values["codes"].astype(np.int64), values["codebooks"].astype(np.uint8)
        return decode_neural(codec, raw, codes.reshape(-1, cols), values["scales"], rows)
    assert isinstance(codec, TrellisCodec)
    return _trellis(codec, values, rows, cols)


def _untransform(fmt: Format, values: dict[str, Array], weights: Array) -> Array:
    """T^-1: rotation, permutation and column scales undone."""
    rows, cols = weights.shape
    if fmt.rotated:
        weights = rotation(rows).T @ weights @ rotation(cols)
    if fmt.permuted:
        order = values["permutation"].astype(np.int64)
        if sorted(order.tolist()) != list(range(cols)):
            raise ValueError("field 'permutation' is not a permutation of the columns")
        restored = np.empty_like(weights)
        restored[:, order] = weights
        weights = restored
    return weights * values["channel_scales"] if fmt.channel_scales else weights


def _sparse(values: dict[str, Array], rows: int, cols: int) -> Array:
    counts, where = values["sparse_counts"].astype(np.int64), values["sparse_cols"].astype(np.int64)
    if int(counts.sum()) != len(where) or (where.size and int(where.max()) >= cols):
        raise ValueError("the sparse fields contradict each other")
    result = np.zeros((rows, cols))
    np.add.at(result, (np.repeat(np.arange(rows), counts), where), values["sparse_values"])
    return result


def _low_rank(term: LowRank, values: dict[str, Array], rows: int, cols: int) -> Array:
    left, right = values["left"].reshape(rows, term.rank), values["right"].reshape(term.rank, cols)
    if term.dtype == "i4":
        left, right = left - 8, right - 8
    if term.dtype != "f16":
        left, right = left * values["left_scales"], right * values["right_scales"][:, None]
    return left @ right


def decode_reference(fmt: Format, packed: Packed, rows: int, cols: int) -> Array:
    """W_hat, float64 [rows, cols], from the fields of `fmt.fields(rows, cols)`.

    A shared codebook is passed in `packed` under its field's name. Raises ValueError on any wrong size or code.
    """
    fields = fmt.fields(rows, cols)
    if shared := fmt.shared_field:
        fields = (*fields, shared)
    values = {field.name: read_field(field, packed) for field in fields}
    codec = fmt.codec
    if isinstance(codec, DenseCodec):
        return values["values"].reshape(rows, cols)
    weights = _untransform(fmt, values, _codes(fmt, values, rows, cols))
    if fmt.sparse:
        weights = weights + _sparse(values, rows, cols)
    return weights + _low_rank(fmt.low_rank, values, rows, cols) if fmt.low_rank else weights
