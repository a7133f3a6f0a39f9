"""The trellis: rings of bits, their states and values, compared to walks by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reallm.kernels.codes.trellis import (
    CODE_STD,
    CODE_UNIT,
    TILE_WEIGHTS,
    check_widths,
    code_table,
    decode_trellis,
    pack_states,
    step_shape,
    unpack_states,
)
from reallm.kernels.formats.codecs import TILE, TrellisCodec

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12)


def closed_walk(rng: np.random.Generator, tiles: int, bits: int, state_bits: int, steps: int) -> np.ndarray:
    """Random closed walks: the first round of the shift register finds the state in which the second starts."""
    new_bits = rng.integers(0, 1 << bits, (tiles, steps))
    state = np.zeros(tiles, dtype=np.int64)
    walk = np.empty((tiles, steps), dtype=np.int64)
    for _ in range(2):
        for t in range(steps):
            state = (state << bits | new_bits[:, t]) & ((1 << state_bits) - 1)
            walk[:, t] = state
    return walk


@given(st.sampled_from(WIDTHS), st.integers(8, 16), st.integers(0, 2**32 - 1))
def test_a_closed_walk_comes_back_from_its_ring(width: int, state_bits: int, seed: int) -> None:
    _, bits, steps = step_shape(width)
    walk = closed_walk(np.random.default_rng(seed), 3, bits, state_bits, steps)
    ring = pack_states(walk, bits)
    assert ring.dtype == np.uint32 and ring.shape == (3, width * TILE_WEIGHTS // 64)
    assert np.array_equal(unpack_states(ring, bits, state_bits), walk)


def test_a_ring_by_hand() -> None:
    # One bit per step, 256 steps; only step 0 shifts in a 1: position 255 of the ring, the last bit of the last word.
    walk = np.zeros((1, 256), dtype=np.int64)
    for t in range(8):
        walk[0, t] = 1 << t
    ring = pack_states(walk, 1)
    assert ring[0, 7] == 1 << 31 and not ring[0, :7].any()
    assert np.array_equal(unpack_states(ring, 1, 8), walk)


def test_values_are_byte_sums_of_products() -> None:
    table = code_table(10, 2)
    for state in (0, 1, 777, 1023):
        for v, multiplier in enumerate((0x83DCD12D, 0x9E3779B1)):
            total = sum((state * multiplier % 2**32).to_bytes(4, "little"))
            assert table[state, v] == total - 510


@pytest.mark.parametrize("state_bits", [10, 12, 14, 16])
def test_values_look_normal(state_bits: int) -> None:
    values = code_table(state_bits, 2).astype(float) / CODE_STD
    assert np.abs(values.mean(0)).max() < 0.02 and np.abs(values.std(0) - 1).max() < 0.02
    spread = 4 * (24 / 2**state_bits) ** 0.5  # four standard errors of the kurtosis
    assert np.abs((values**4).mean(0) - 2.7).max() < spread  # four uniform bytes: 3 - 1.2 / 4
    assert abs(np.corrcoef(values.T)[0, 1]) < 4 / 2 ** (state_bits / 2)  # as independent as random draws


def test_blocks_follow_each_other_and_edges_are_cut() -> None:
    codec, rng = TrellisCodec(16, 8), np.random.default_rng(0)  # 2 bits per weight
    rows, cols = 20, 40
    down, across = codec.grid(rows, cols)
    widths = np.array([2, 0, 7])
    expected, words = np.zeros((down * TILE, across * TILE)), []
    for block, width in enumerate(widths):
        if width:
            values, bits, steps = step_shape(int(width))
            walk = closed_walk(rng, down, bits, 8, steps)
            words.append(pack_states(walk, bits).reshape(-1))
            tiles = code_table(8, values)[walk].reshape(down, TILE, TILE)
            expected[:, block * TILE : (block + 1) * TILE] = tiles.reshape(-1, TILE) * CODE_UNIT
    stored = np.zeros(codec.fields(rows, cols)[0].count, dtype=np.uint32)
    filled = np.concatenate(words)
    stored[: len(filled)] = filled
    assert np.array_equal(decode_trellis(codec, stored, widths, rows, cols), expected[:rows, :cols])


def test_widths_over_the_total_or_the_state_are_refused() -> None:
    codec = TrellisCodec(16, 8)
    with pytest.raises(ValueError, match="do not fit"):
        check_widths(codec, np.array([4, 5]), 32)
    with pytest.raises(ValueError, match="do not fit"):
        check_widths(TrellisCodec(48, 8), np.array([11]), 16)  # 11 bits per step of two values: more than the state has


def test_sizes_by_hand() -> None:
    # 576 x 576 at 2.25 bits: 36 x 36 tiles of 256 weights in 72 bytes; 36 widths of 4 bits -> 64; 36 scales -> 128.
    fields = {field.name: field.nbytes for field in TrellisCodec(18, 12).fields(576, 576)}
    assert fields == {"words": 36 * 36 * 72, "widths": 64, "scales": 128}
