"""The bitshift trellis with a computed code (QTIP, arXiv 2406.11235): its values, and how its bits are packed.

A state s of L bits stands for V values, each the sum of the four bytes of a product minus the mean of that sum (close
to a normal distribution of standard deviation CODE_STD):

    value_v(s) = bytesum(s * MULTIPLIERS[v] mod 2^32) - 510

A tile of T = 256 weights is a closed walk of n = T / V steps, s' = (s 2^k + bits) mod 2^L. Its k n bits form a ring
with the bits of step t at position k (n - 1 - t), so the state of step t is the L bits of the ring that start there,
and every weight can be decoded by itself. `formats.codecs.TrellisCodec` describes how tiles form a matrix. Other
decoders are tested against this one.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from reallm.kernels.formats.codecs import TILE, TrellisCodec

MULTIPLIERS = (0x83DCD12D, 0x9E3779B1)
"""One multiplier per value of a step: the constant of EXL3's "mul1" code, and the golden ratio in 32 bits. Both are
odd, so that the lowest byte of the product is uniform."""
CODE_MEAN, CODE_STD = 510, 147.8
CODE_UNIT = 2.0**-7
"""A weight is its code times CODE_UNIT times the scale of its block; the factor keeps scales well inside fp16."""
TILE_WEIGHTS = TILE * TILE
WORDS_PER_WIDTH = TILE_WEIGHTS // 2 // 32
"""Number of 32-bit words that a tile takes for each half bit per weight."""


def step_shape(width: int) -> tuple[int, int, int]:
    """(V values per step, k bits per step, n steps) of a tile with `width` half bits per weight."""
    values = 2 if width % 2 else 1
    return values, width * values // 2, TILE_WEIGHTS // values


@cache
def code_table(state_bits: int, values: int) -> NDArray[np.int16]:
    """The values of every state, int16 [2^L, V], read-only."""
    states = np.arange(1 << state_bits, dtype=np.uint64)
    columns = []
    for multiplier in MULTIPLIERS[:values]:
        product = states * np.uint64(multiplier) & np.uint64(0xFFFFFFFF)
        total = sum((product >> np.uint64(8 * i)) & np.uint64(255) for i in range(4))
        columns.append(np.asarray(total, dtype=np.int16) - np.int16(CODE_MEAN))
    result = np.stack(columns, 1)
    result.setflags(write=False)
    return result


def pack_states(states: NDArray[np.integer], bits: int) -> NDArray[np.uint32]:
    """Pack closed walks `states` [tiles, n] with `bits` bits per step into rings, uint32 [tiles, n bits / 32]."""
    newest = (states.astype(np.uint32) & np.uint32((1 << bits) - 1))[:, ::-1]
    spread = (newest[:, :, None] >> np.arange(bits, dtype=np.uint32)) & np.uint32(1)
    flat = spread.reshape(len(states), -1).astype(np.uint8)
    return np.packbits(flat, axis=1, bitorder="little").view("<u4").astype(np.uint32)


def unpack_states(words: NDArray[np.uint32], bits: int, state_bits: int) -> NDArray[np.int64]:
    """The inverse of `pack_states`: the states [tiles, n] of rings [tiles, n bits / 32]."""
    ring = np.unpackbits(np.ascontiguousarray(words.astype("<u4")).view(np.uint8), axis=1, bitorder="little")
    size = ring.shape[1]
    starts = bits * (size // bits - 1 - np.arange(size // bits))
    window = (starts[:, None] + np.arange(state_bits)) % size
    result: NDArray[np.int64] = (ring[:, window].astype(np.int64) << np.arange(state_bits)).sum(2)
    return result


def check_widths(codec: TrellisCodec, widths: NDArray[np.integer], cols: int) -> None:
    """Raise ValueError for widths of blocks that no encoder writes."""
    if int(widths.sum()) > codec.total_width(cols) or any(step_shape(int(w))[1] > codec.state_bits for w in widths):
        raise ValueError(
            f"widths of {int(widths.sum())} half bits in total do not fit {codec.name} with {cols} columns"
        )


def decode_trellis(
    codec: TrellisCodec, words: NDArray[np.uint32], widths: NDArray[np.integer], rows: int, cols: int
) -> NDArray[np.float64]:
    """The coded matrix before scaling, float64 [rows, cols]. Raises ValueError for widths that no encoder writes."""
    check_widths(codec, widths, cols)
    down, across = codec.grid(rows, cols)
    result = np.zeros((down * TILE, across * TILE))
    start = 0
    for block, width in enumerate(int(w) for w in widths):
        if width == 0:
            continue
        values, bits, _ = step_shape(width)
        stop = start + down * width * WORDS_PER_WIDTH
        states = unpack_states(words[start:stop].reshape(down, -1), bits, codec.state_bits)
        tiles = code_table(codec.state_bits, values)[states].reshape(down * TILE, TILE) * CODE_UNIT
        result[:, block * TILE : (block + 1) * TILE] = tiles
        start = stop
    return result[:rows, :cols]
