"""The decoder of each codec: from codes to values. For the formulas see `reallm.kernels.formats.codecs`.

DECODERS has one function for every codec. It returns the decoded codes as float32 [n, cols] for the n rows that the
reader selects. Transforms are not yet undone, and the sparse and low-rank terms are not yet added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from reallm.kernels.codes.lattice import RESIDUAL_SCALE, SHIFT, absolute_vectors, odd_sign_parity, root_words
from reallm.kernels.codes.tables import table
from reallm.kernels.codes.trellis import CODE_UNIT, WORDS_PER_WIDTH, code_table, step_shape
from reallm.kernels.formats.codecs import (
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

from .field_reader import FieldReader
from .neural import decode_neural


def spread_groups(values: Tensor, width: int, cols: int) -> Tensor:
    """Repeat one value per group [n, groups] over the `width` weights of the group: [n, cols]."""
    return values.repeat_interleave(width, dim=1)[:, :cols]


def _decode_dense(codec: DenseCodec, read: FieldReader, rows: int, cols: int) -> Tensor:
    return read.row_floats("values")


def _scalar_scales(codec: ScalarCodec, read: FieldReader, groups: int) -> Tensor:
    """The scales of a scalar codec, [n, groups]."""
    double = codec.double_quant
    if double is None:
        return read.row_floats("scales")
    ranges = read.all_floats("scale_ranges")[read.positions(groups) // double.block]
    scales: Tensor = read.row_codes("scale_codes").to(torch.float32) / (2**double.bits - 1) * ranges
    return read.all_floats("scale_min") + scales


def _decode_scalar(codec: ScalarCodec, read: FieldReader, rows: int, cols: int) -> Tensor:
    groups, width = codec.group_count(cols), codec.group_width(cols)
    scales = spread_groups(_scalar_scales(codec, read, groups), width, cols)
    codes = read.row_codes("codes")
    if codec.table == "uint":
        return (codes.to(torch.float32) - spread_groups(read.row_codes("zeros"), width, cols)) * scales
    levels = torch.tensor(table(codec.table, codec.bits), device=codes.device)
    return levels[codes.to(torch.int32)] * scales


def _decode_additive(codec: AdditiveCodec, read: FieldReader, rows: int, cols: int) -> Tensor:
    codes = read.row_codes("codes").to(torch.int32)
    codes = codes.view(codes.shape[0], codec.group_count(cols), codec.num_codebooks)
    codebooks = read.all_floats("codebooks").view(codec.num_codebooks, 1 << codec.codebook_bits, codec.dim)
    words = codebooks[0][codes[:, :, 0]]
    for m in range(1, codec.num_codebooks):
        words += codebooks[m][codes[:, :, m]]
    return words.reshape(codes.shape[0], -1)[:, :cols] * read.row_floats("scales")


def _decode_kmeans(codec: KMeansCodec, read: FieldReader, rows: int, cols: int) -> Tensor:
    return read.row_floats("levels").gather(1, read.row_codes("codes").to(torch.int64))


def _e8p_words(codes: Tensor) -> Tensor:
    """The words [..., 8] of E8P codes [...]."""
    codes = codes.to(torch.int32)
    magnitudes = torch.from_numpy(absolute_vectors().copy()).to(codes.device, torch.float32)
    odd = torch.from_numpy(odd_sign_parity().copy()).to(codes.device)
    index = codes >> 8
    minus = (codes[..., None] >> torch.arange(1, 9, device=codes.device, dtype=torch.int32)) & 1
    minus[..., 7] = (minus[..., :7].sum(-1) + odd[index]) & 1
    return magnitudes[index] * (1 - 2 * minus) + ((codes & 1) * (2 * SHIFT) - SHIFT)[..., None]


def _decode_lattice(codec: LatticeCodec, read: FieldReader, rows: int, cols: int) -> Tensor:
    words = _e8p_words(read.row_codes("codes"))
    if codec.bits > 2:
        residuals = read.row_codes("residuals")
        if codec.bits == 4:
            residual_words = _e8p_words(residuals)
        else:
            residual_words = torch.from_numpy(root_words().copy()).to(words)[residuals.to(torch.int32)]
        words += RESIDUAL_SCALE[codec.bits] * residual_words
    return words.flatten(1)[:, :cols] * read.all_floats("scales").repeat_interleave(TILE)[:cols]


def _decode_trellis(codec: TrellisCodec, read: FieldReader, rows: int, cols: int) -> Tensor:
    """Decode trellis codes: always all rows of the matrix, because a tile spans TILE rows."""
    down, across = codec.grid(rows, cols)
    widths = read.all_codes("widths")
    too_wide = any(step_shape(width)[1] > codec.state_bits for width in widths.tolist())
    if too_wide or int(widths.sum()) > codec.total_width(cols):
        raise ValueError(f"field 'widths' does not fit {codec.name} with {cols} columns")
    words = read.all_words("words")
    starts = (widths.cumsum(0) - widths) * (down * WORDS_PER_WIDTH)
    decoded = torch.zeros(across, down, TILE * TILE, device=words.device)
    for width in sorted(set(widths.tolist()) - {0}):
        values_per_step, bits, steps = step_shape(width)
        blocks = torch.nonzero(widths == width).flatten()
        size = width * WORDS_PER_WIDTH
        rings = words[starts[blocks][:, None] + torch.arange(down * size, device=words.device)].view(-1, size)
        position = bits * torch.arange(steps - 1, -1, -1, device=words.device)
        low, high = rings[:, position >> 5], rings[:, ((position >> 5) + 1) % size]
        states = ((low | high << 32) >> (position & 31)) & ((1 << codec.state_bits) - 1)
        values = torch.from_numpy(code_table(codec.state_bits, values_per_step).copy()).to(words.device, torch.float32)
        decoded[blocks] = values[states].view(len(blocks), down, TILE * TILE)
    decoded *= CODE_UNIT * read.all_floats("scales")[:, None, None]
    tiles = decoded.view(across, down * TILE, TILE).transpose(0, 1).reshape(down * TILE, across * TILE)
    return tiles[:rows, :cols]


def _decode_neural(codec: NeuralCodec, read: FieldReader, rows: int, cols: int) -> Tensor:
    """Decode neural codes: always all rows of the matrix, because a patch depends on the codes above it."""
    codes = read.all_codes("codes").view(-1, cols)
    return decode_neural(codec, read.all_codes("codebooks"), codes, read.all_floats("scales"), rows)


Decoder = Callable[[Any, FieldReader, int, int], Tensor]
"""(codec, reader of its fields, rows, cols) -> decoded codes [n, cols]."""

DECODERS: Mapping[type[AnyCodec], Decoder] = {
    DenseCodec: _decode_dense,
    ScalarCodec: _decode_scalar,
    KMeansCodec: _decode_kmeans,
    AdditiveCodec: _decode_additive,
    LatticeCodec: _decode_lattice,
    TrellisCodec: _decode_trellis,
    NeuralCodec: _decode_neural,
}

WHOLE_MATRIX_CODECS = (TrellisCodec, NeuralCodec)
"""Codecs whose rows cannot be decoded one by one: their decoders always return all rows."""
