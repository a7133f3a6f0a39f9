"""The E8 codebooks: their words are the documented lattice points, and codes decode as computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reallm.kernels.codes.lattice import (
    RESIDUAL_SCALE,
    absolute_vectors,
    decode_lattice,
    e8p_words,
    odd_sign_parity,
    root_words,
)


def in_e8(points: np.ndarray) -> np.ndarray:
    """Whether points [n, 8] are all integers or all halves, with an even sum."""
    doubled = np.round(2 * points).astype(int)
    same = (doubled % 2 == doubled[:, :1] % 2).all(1) & (np.abs(2 * points - doubled).max(1) == 0)
    return same & (doubled.sum(1) % 4 == 0)


def test_there_are_227_short_vectors_and_29_long_ones() -> None:
    norms = (absolute_vectors() ** 2).sum(1)
    assert (norms[:227] <= 10).all() and (norms[227:] == 12).all() and len(norms) == 256
    assert len(np.unique(absolute_vectors(), axis=0)) == 256
    # the choice of long vectors is part of the format
    assert absolute_vectors()[227].tolist() == [0.5, 0.5, 0.5, 1.5, 1.5, 1.5, 1.5, 1.5]
    assert absolute_vectors()[254:].tolist() == [[1.5, 1.5, 1.5, 1.5, 0.5, 1.5, 0.5, 0.5], [1.5] * 5 + [0.5] * 3]


def test_all_words_are_distinct_points_of_the_shifted_lattice() -> None:
    words = e8p_words(np.arange(1 << 16))
    assert len(np.unique(words, axis=0)) == 1 << 16
    assert in_e8(words + 0.25).all()
    assert np.array_equal(np.sort(np.unique(np.abs(words))), [0.25, 0.75, 1.25, 1.75, 2.25, 2.75])


def test_the_second_codebook_holds_all_roots() -> None:
    words = root_words()
    counts = dict(zip(*np.unique((words**2).sum(1), return_counts=True), strict=True))
    assert counts == {0.0: 1, 2.0: 240, 4.0: 15} and len(np.unique(words, axis=0)) == 256 and in_e8(words).all()


def test_codes_decode_by_hand() -> None:
    # Index 0 is eight halves; minus signs at coordinates 0 and 2; shift +1/4. Two is even, so the eighth sign is plus.
    assert e8p_words(np.array(0b1011))[()].tolist() == [-0.25, 0.75, -0.25, 0.75, 0.75, 0.75, 0.75, 0.75]
    # One minus sign at coordinate 1, shift -1/4: the eighth sign is minus too.
    assert e8p_words(np.array(0b100)).tolist() == [0.25, -0.75, 0.25, 0.25, 0.25, 0.25, 0.25, -0.75]
    assert absolute_vectors()[1].tolist() == [0.5] * 7 + [1.5] and odd_sign_parity()[1]
    assert e8p_words(np.array(1 << 8)).tolist() == [0.25] * 7 + [-1.75]


@given(st.lists(st.integers(0, 65535), min_size=1, max_size=9), st.integers(0, 2**32 - 1))
def test_residual_words_add_to_the_first(codes: list[int], seed: int) -> None:
    first = np.array(codes)
    second = np.random.default_rng(seed).integers(0, 1 << 16, len(codes))
    assert np.array_equal(decode_lattice(2, first, None), e8p_words(first))
    four = decode_lattice(4, first, second) - e8p_words(first)
    assert four == pytest.approx(RESIDUAL_SCALE[4] * e8p_words(second), abs=8 * np.finfo(float).eps)
    three = decode_lattice(3, first, second % 256) - e8p_words(first)
    assert three == pytest.approx(RESIDUAL_SCALE[3] * root_words()[second % 256], abs=8 * np.finfo(float).eps)
