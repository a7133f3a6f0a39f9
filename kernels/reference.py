"""The reference decoder: packed bytes to float64 weights, in numpy, written for clarity.

Every other decoder (torch, Triton, C++) is tested against this one. The formulas are in `formats` and `codecs`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from .codes.hadamard import rotation
from .codes.lattice import decode_lattice
from .codes.neural import decode_neural
from .codes.stored_fields import Packed, read_field
from .codes.tables import table
from .codes.trellis import decode_trellis
from .formats.codecs import (
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
from .formats.formats import Format
from .formats.terms import LowRank

Array = NDArray[np.float64]
Values = Mapping[str, Array]
"""Field name -> its values, float64 [count]."""


def _decode_dense(codec: DenseCodec, values: Values, rows: int, cols: int) -> Array:
    return values["values"].reshape(rows, cols)


def _decode_scalar(codec: ScalarCodec, values: Values, rows: int, cols: int) -> Array:
    groups = codec.group_count(cols)
    group_of_column = np.arange(cols) // codec.group_width(cols)
    codes = values["codes"].reshape(rows, cols).astype(np.int64)
    if codec.double_quant is None:
        scales = values["scales"]
    else:
        block = np.arange(rows * groups) // codec.double_quant.block
        steps = 2**codec.double_quant.bits - 1
        scales = values["scale_min"][0] + values["scale_codes"] / steps * values["scale_ranges"][block]
    scales = scales.reshape(rows, groups)[:, group_of_column]
    if codec.table == "uint":
        zeros = values["zeros"].reshape(rows, groups)[:, group_of_column]
        return (codes - zeros) * scales
    return table(codec.table, codec.bits).astype(np.float64)[codes] * scales


def _decode_additive(codec: AdditiveCodec, values: Values, rows: int, cols: int) -> Array:
    groups = codec.group_count(cols)
    codes = values["codes"].reshape(rows, groups, codec.num_codebooks).astype(np.int64)
    books = values["codebooks"].reshape(codec.num_codebooks, 1 << codec.codebook_bits, codec.dim)
    words = sum(books[m][codes[:, :, m]] for m in range(codec.num_codebooks))
    assert isinstance(words, np.ndarray)
    weights: Array = words.reshape(rows, groups * codec.dim)[:, :cols] * values["scales"][:, None]
    return weights


def _decode_kmeans(codec: KMeansCodec, values: Values, rows: int, cols: int) -> Array:
    codes = values["codes"].reshape(rows, cols).astype(np.int64)
    return np.take_along_axis(values["levels"].reshape(rows, 1 << codec.bits), codes, axis=1)


def _decode_trellis(codec: TrellisCodec, values: Values, rows: int, cols: int) -> Array:
    unscaled = decode_trellis(codec, values["words"].astype(np.uint32), values["widths"].astype(np.int64), rows, cols)
    weights: Array = unscaled * values["scales"].repeat(TILE)[:cols]
    return weights


def _decode_lattice(codec: LatticeCodec, values: Values, rows: int, cols: int) -> Array:
    second = values["residuals"].astype(np.int64) if codec.bits > 2 else None
    words = decode_lattice(codec.bits, values["codes"].astype(np.int64), second)
    weights: Array = words.reshape(rows, -1)[:, :cols] * values["scales"].repeat(TILE)[:cols]
    return weights


def _decode_neural(codec: NeuralCodec, values: Values, rows: int, cols: int) -> Array:
    codes, raw = values["codes"].astype(np.int64), values["codebooks"].astype(np.uint8)
    return decode_neural(codec, raw, codes.reshape(-1, cols), values["scales"], rows)


REFERENCE_DECODERS: Mapping[type[AnyCodec], Callable[..., Array]] = {
    DenseCodec: _decode_dense,
    ScalarCodec: _decode_scalar,
    AdditiveCodec: _decode_additive,
    KMeansCodec: _decode_kmeans,
    TrellisCodec: _decode_trellis,
    LatticeCodec: _decode_lattice,
    NeuralCodec: _decode_neural,
}
"""Codec class -> function of (codec, values, rows, cols) that returns the coded matrix, float64 [rows, cols]."""


def _undo_transforms(fmt: Format, values: Values, weights: Array) -> Array:
    """Apply T^-1 to the decoded matrix: undo the rotation, the permutation and the column scales, in this order."""
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


def _sparse(values: Values, rows: int, cols: int) -> Array:
    counts, columns = values["sparse_counts"].astype(np.int64), values["sparse_cols"].astype(np.int64)
    if int(counts.sum()) != len(columns) or (columns.size and int(columns.max()) >= cols):
        raise ValueError("the sparse fields contradict each other")
    result = np.zeros((rows, cols))
    np.add.at(result, (np.repeat(np.arange(rows), counts), columns), values["sparse_values"])
    return result


def _low_rank(term: LowRank, values: Values, rows: int, cols: int) -> Array:
    left, right = values["left"].reshape(rows, term.rank), values["right"].reshape(term.rank, cols)
    if term.dtype == "i4":
        left, right = left - 8, right - 8
    if term.dtype != "f16":
        left, right = left * values["left_scales"], right * values["right_scales"][:, None]
    return left @ right


def decode_reference(fmt: Format, packed: Packed, rows: int, cols: int) -> Array:
    """Decode a matrix: W_hat, float64 [rows, cols], from the fields of `fmt.fields(rows, cols)`.

    A shared codebook is passed in `packed` under its field's name. Raises ValueError for a missing field, a wrong
    size, and stored values that no encoder writes.
    """
    fields = fmt.fields(rows, cols)
    if shared := fmt.shared_field:
        fields = (*fields, shared)
    values = {field.name: read_field(field, packed) for field in fields}
    coded = REFERENCE_DECODERS[type(fmt.codec)](fmt.codec, values, rows, cols)
    weights = _undo_transforms(fmt, values, coded)
    if fmt.sparse:
        weights = weights + _sparse(values, rows, cols)
    return weights + _low_rank(fmt.low_rank, values, rows, cols) if fmt.low_rank else weights
