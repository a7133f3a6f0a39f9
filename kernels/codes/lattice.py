"""E8 lattice codebooks (QuIP#, arXiv 2402.04396): the words that the codes of groups of 8 weights stand for.

E8P has 2^16 words of the shifted lattice E8 + 1/4, which contains z + 1/4 and z - 1/4 for every z of
D = {z in (Z + 1/2)^8, sum z even}. A word is z = (+-a_1, ..., +-a_8) for one of 256 vectors a of odd halves, plus or
minus 1/4 in all coordinates:

    code = 2^8 index(a) + 2 (sign bits of the first seven) + (1 if the shift is +1/4)

The eighth sign makes sum z even: the number of minus signs and the number of entries 3/2 of a have the same parity. The
vectors a are all 227 of squared norm up to 10, ordered by norm and then lexicographically, and 29 of the 56 with five
entries 3/2 (squared norm 12): in lexicographic order the first, third, fifth and so on, and the last.

The second codebook, at 3 bits, has 2^8 words of E8 itself: 0, the 112 roots (+-1, +-1, 0...), the 128 roots of halves
with an even number of minus signs, and 15 of the 16 words (+-2, 0...). Other decoders are tested against this one.
"""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
from numpy.typing import NDArray

DIM = 8
SHIFT = 0.25
RESIDUAL_SCALE = {2: 0.0, 3: 0.5, 4: 0.265625}
"""Bits per weight -> factor of the words of the second codebook."""

Array = NDArray[np.float64]


@cache
def absolute_vectors() -> Array:
    """The vectors a of E8P in the order of their index, [256, 8], read-only."""
    grid = np.array(list(itertools.product((0.5, 1.5, 2.5), repeat=DIM)))
    norms = (grid**2).sum(1)
    short = grid[norms <= 10]
    short = short[np.argsort((short**2).sum(1), kind="stable")]
    five = grid[(norms == 12) & (grid.max(1) < 2)]
    result = np.concatenate([short, five[::2], five[-1:]])
    result.setflags(write=False)
    return result


@cache
def odd_sign_parity() -> NDArray[np.bool_]:
    """Whether each vector of `absolute_vectors` takes an odd number of minus signs, [256], read-only."""
    result: NDArray[np.bool_] = (absolute_vectors() == 1.5).sum(1) % 2 == 1
    result.setflags(write=False)
    return result


def e8p_words(codes: NDArray[np.integer]) -> Array:
    """The words of E8P `codes` (any shape): float64 [..., 8]."""
    codes = codes.astype(np.int64)
    index, shift = codes >> 8, np.where(codes & 1, SHIFT, -SHIFT)
    negative = (codes[..., None] >> np.arange(1, DIM)) & 1
    last = (negative.sum(-1) + odd_sign_parity()[index]) % 2
    signs = 1.0 - 2.0 * np.concatenate([negative, last[..., None]], -1)
    result: Array = signs * absolute_vectors()[index] + shift[..., None]
    return result


@cache
def root_words() -> Array:
    """The second codebook at 3 bits, [256, 8], read-only."""
    words = [np.zeros(DIM)]
    for (i, j), (s, t) in itertools.product(
        itertools.combinations(range(DIM), 2), itertools.product((1, -1), repeat=2)
    ):
        words.append(s * np.eye(DIM)[i] + t * np.eye(DIM)[j])
    words += [np.array(s) / 2 for s in itertools.product((1.0, -1.0), repeat=DIM) if np.prod(s) > 0]
    words += [s * 2.0 * np.eye(DIM)[i] for i in range(DIM) for s in (1, -1)][:15]
    result = np.stack(words)
    result.setflags(write=False)
    return result


def decode_lattice(bits: int, codes: NDArray[np.integer], second: NDArray[np.integer] | None) -> Array:
    """The groups of weights that codes (any shape) of `bits` bits per weight stand for, before scaling: [..., 8].

    `second` holds the codes of the second codebook, None at 2 bits.
    """
    words = e8p_words(codes)
    if second is None:
        return words
    residuals = root_words()[second.astype(np.int64)] if bits == 3 else e8p_words(second)
    return words + RESIDUAL_SCALE[bits] * residuals
