"""The exact search for the nearest word of the E8P codebook, by sorting the coordinates' magnitudes.

For a shift s and y = x - s, consider all words with a given multiset of magnitudes. The best of them has the signs of y
and its large magnitudes where |y| is large (rearrangement inequality). If these signs have the wrong parity, the sign
at the smallest |y|, where the magnitude is 1/2, is flipped. So it is enough to try one word for each of 7 multisets to
cover the 227 short vectors; these have up to four entries 3/2, or one entry 5/2 and at most one 3/2. The 29 long
vectors are tried one by one, but only where an upper bound of their scores exceeds the best score so far; the bound is
the score of five entries 3/2 at the five largest |y|. The score of a word, without its shift, is
<y, word> - |word|^2 / 2; the nearest word has the highest score.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from reallm.kernels.codes.lattice import DIM, SHIFT, absolute_vectors, root_words

SHORT = 227
MULTISETS = ((0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1), (0, 5))
"""(number of entries 5/2, number of entries 3/2); the last multiset bounds the long vectors."""


@cache
def _multisets() -> tuple[Tensor, Tensor]:
    """The 8 multisets: (magnitudes in falling order [8, multisets], half of each squared norm [multisets])."""
    columns = [[2.5] * five + [1.5] * three + [0.5] * (DIM - five - three) for five, three in MULTISETS]
    sorted_magnitudes = torch.tensor(columns).T.contiguous()
    return sorted_magnitudes, sorted_magnitudes.square().sum(0) / 2


@cache
def _vector_indices() -> Tensor:
    """Table int64 [3^8]: vector of magnitudes, read as a base-3 number (digits 0, 1, 2 for 1/2, 3/2, 5/2) -> index."""
    indices = torch.zeros(3**DIM, dtype=torch.int64)
    digits = torch.from_numpy(absolute_vectors() - 0.5).long()
    indices[digits @ 3 ** torch.arange(DIM)] = torch.arange(256)
    return indices


def nearest_e8p(x: Tensor) -> tuple[Tensor, Tensor]:
    """Find the E8P words nearest to x [n, 8]: (codes int64 [n], words float32 [n, 8])."""
    count = len(x)
    y = torch.cat([x + SHIFT, x - SHIFT])
    magnitude, odd = y.abs(), (y < 0).sum(1) % 2 == 1
    # the coordinate's number replaces the lowest three bits of its magnitude (a change of 2^-21), so that one sort
    # orders both
    keys = (magnitude.view(torch.int32) & -8) | torch.arange(DIM, dtype=torch.int32)
    order = torch.from_numpy(np.sort(keys.numpy(), axis=1)).flip(1)
    rank = (order & 7).long()
    falling = magnitude.gather(1, rank)
    table, norms = _multisets()
    scores = torch.addmm(-norms, falling, table)
    wrong = odd[:, None] != torch.tensor([three % 2 == 1 for _, three in MULTISETS])
    scores[:, :-1].sub_(falling[:, -1:] * wrong[:, :-1])
    best = torch.from_numpy(scores[:, :-1].numpy().argmax(1))
    best_score = scores.gather(1, best[:, None]).squeeze(1)
    chosen = torch.empty_like(y).scatter_(1, rank, table.T[best])
    flip = torch.where(wrong.gather(1, best[:, None]).squeeze(1), rank[:, -1], -1)
    _try_long(magnitude, odd, scores[:, -1], best_score, chosen, flip)
    # the distance is |y|^2 - 2 <y, word> + |word|^2, and |y|^2 differs between the two shifts
    plus = best_score[count:] > best_score[:count] - 2 * SHIFT * x.sum(1)
    picked = torch.arange(count) + count * plus
    return _assemble(y[picked], chosen[picked], flip[picked], plus)


def _try_long(magnitude: Tensor, odd: Tensor, bound: Tensor, best_score: Tensor, chosen: Tensor, flip: Tensor) -> None:
    """Try the long vectors, and write those that score higher into `best_score`, `chosen` and `flip`."""
    rows = torch.nonzero(bound > best_score).flatten()
    if not len(rows):
        return
    vectors = torch.from_numpy(absolute_vectors()[SHORT:].copy()).float()
    products = magnitude[rows][:, None] * vectors
    wrong = ~odd[rows]  # with five entries 3/2 the number of minus signs must be odd
    scores = products.sum(2) - 6 - 2 * products.amin(2) * wrong[:, None]
    highest, best = scores.max(1)
    better = highest > best_score[rows]
    rows, best, wrong = rows[better], best[better], wrong[better]
    best_score[rows], chosen[rows] = highest[better], vectors[best]
    flip[rows] = torch.where(wrong, (magnitude[rows] * vectors[best]).argmin(1), -1)


def _assemble(y: Tensor, chosen: Tensor, flip: Tensor, plus: Tensor) -> tuple[Tensor, Tensor]:
    """Assemble (codes, words) from the chosen magnitudes, the sign to flip (-1: none) and the sign of the shift."""
    minus = (y < 0) ^ (torch.arange(DIM) == flip[:, None])
    words = torch.where(minus, -chosen, chosen) + torch.where(plus, SHIFT, -SHIFT)[:, None]
    index = _vector_indices()[((chosen - 0.5) @ (3.0 ** torch.arange(DIM))).long()]
    signs = (minus[:, :-1] * (1 << torch.arange(DIM - 1))).sum(1)
    return (index << 8) | (signs << 1) | plus, words


def nearest_root(x: Tensor) -> tuple[Tensor, Tensor]:
    """Find the words nearest to x [n, 8] in the residual codebook for three bits per weight.

    Returns (codes int64 [n], words float32 [n, 8]).
    """
    book = torch.from_numpy(root_words().copy()).float()
    scores = torch.addmm(-0.5 * book.square().sum(1), x, book.T)
    codes = torch.from_numpy(scores.numpy().argmax(1))
    return codes, book[codes]
