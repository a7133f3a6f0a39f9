"""Sparse outliers: weights that cost most to code are kept apart (SpQR, arXiv 2306.03078; SqueezeLLM, 2306.07629).

    W_hat = decode(codes of W with zeros at the outliers) + S

1. Places. With h the diagonal of H, or what feedback leaves of it, one half are the largest h w^2, which widen the grid
   of their neighbours; the other half the largest h e^2, e the error of coding the rest without feedback.
2. Values. S starts at W, so that E is what the codec saw, and each of its values then moves to where tr(E H E^T) is
   least given all others: they also make up for the errors of the codes around them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from reallm.codecs.feedback import descend
from reallm.codecs.metric import Workspace
from reallm.codecs.packed_fields import to_half
from reallm.kernels.formats.terms import Sparse

LARGE_SHARE = 0.5
"""Of the outliers, those that are chosen by their size; the others by their error (docs/log.md)."""


@dataclass(frozen=True)
class Outliers:
    """Where they are, and the matrix without them."""

    mask: Tensor
    """bool [N, K]"""
    rest: Tensor
    """float32 [N, K]: W with zeros in their place."""

    def fit(self, W: Tensor, decoded: Tensor, work: Workspace) -> tuple[dict[str, Tensor], Tensor]:
        """(fields, what they add [N, K]) where the codes of `rest` decode to `decoded` [N, K]."""
        columns, mask = (W - decoded).T[work.order].contiguous(), self.mask.T[work.order]
        sparse = (W - self.rest).T[work.order].contiguous()

        def move(position: int, target: Tensor) -> Tensor:
            sparse[position] = torch.where(mask[position], target, 0.0)
            return sparse[position]

        descend(columns, sparse.clone(), work.ordered_hessian, move)
        added = torch.empty_like(W)
        added[:, work.order] = to_half(sparse.T)
        rows, cols = torch.nonzero(self.mask, as_tuple=True)
        counts = torch.bincount(rows, minlength=len(W))
        return {"sparse_counts": counts, "sparse_cols": cols, "sparse_values": added[rows, cols]}, added


def find_outliers(W: Tensor, term: Sparse, weight: Tensor, code: Callable[[Tensor], Tensor] | None) -> Outliers:
    """The outliers of W[N, K]; `weight` [K] is what a squared error counts, ties go to the earlier place.

    `code` gives what a matrix would decode to; without it all places are chosen by size.
    """
    count = term.count(*W.shape)
    mask = _largest(W.square() * weight, count if code is None else int(count * LARGE_SHARE))
    if code is not None:
        rest = W.masked_fill(mask, 0.0)
        error = (rest - code(rest)).square() * weight
        mask = _largest(error.masked_fill(mask, torch.inf), count)
    return Outliers(mask, W.masked_fill(mask, 0.0))


def _largest(score: Tensor, count: int) -> Tensor:
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    mask[torch.argsort(score.reshape(-1), descending=True, stable=True)[:count]] = True
    return mask.reshape(score.shape)
