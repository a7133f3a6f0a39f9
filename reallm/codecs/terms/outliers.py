"""Sparse outliers: the costliest weights are stored separately (SpQR, arXiv 2306.03078; SqueezeLLM, 2306.07629).


    W_hat = decode(codes of W with zeros at the outliers) + S

1. Positions. Let h_k be the cost of a squared error in column k: the diagonal of H or, for formats with error feedback,
   what later columns cannot compensate. One half of the outliers are the weights with the largest h w^2, which would
   widen the grid of their neighbours. The other half have the largest h e^2, where e is the error of coding the
   remaining weights without feedback.
2. Values. S starts as W at the outliers. Then each value moves to the minimum of tr(E H E^T) with all other values
   fixed, so that the outliers also compensate for the errors of the codes around them.
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
"""Share of the outliers that are chosen by h w^2; the others are chosen by h e^2 (docs/log.md)."""


@dataclass(frozen=True)
class Outliers:
    """The positions of the outliers, and the matrix without them."""

    mask: Tensor
    """bool [N, K], true at the outliers."""
    rest: Tensor
    """float32 [N, K]: W with zeros at the outliers."""

    def fit(self, W: Tensor, decoded: Tensor, work: Workspace) -> tuple[dict[str, Tensor], Tensor]:
        """Fit the values of the outliers; `decoded` [N, K] is what the codes of `rest` decode to.

        Returns the values of the sparse fields by field name, and the term S [N, K].
        """
        columns, mask = (W - decoded).T[work.order].contiguous(), self.mask.T[work.order]
        sparse = (W - self.rest).T[work.order].contiguous()

        def move_to(position: int, target: Tensor) -> Tensor:
            sparse[position] = torch.where(mask[position], target, 0.0)
            return sparse[position]

        descend(columns, sparse.clone(), work.ordered_hessian, move_to)
        added = torch.empty_like(W)
        added[:, work.order] = to_half(sparse.T)
        rows, cols = torch.nonzero(self.mask, as_tuple=True)
        counts = torch.bincount(rows, minlength=len(W))
        return {"sparse_counts": counts, "sparse_cols": cols, "sparse_values": added[rows, cols]}, added


def find_outliers(W: Tensor, term: Sparse, weight: Tensor, trial: Callable[[Tensor], Tensor] | None) -> Outliers:
    """Choose the outliers of W[N, K]; if scores are equal, the earlier one in storage order is taken.

    `weight` [K] is h, the cost of a squared error in each column. `trial` encodes a matrix without feedback and returns
    it decoded; if None, all outliers are chosen by h w^2.
    """
    count = term.count(*W.shape)
    mask = _largest(W.square() * weight, count if trial is None else int(count * LARGE_SHARE))
    if trial is not None:
        rest = W.masked_fill(mask, 0.0)
        error = (rest - trial(rest)).square() * weight
        mask = _largest(error.masked_fill(mask, torch.inf), count)
    return Outliers(mask, W.masked_fill(mask, 0.0))


def _largest(score: Tensor, count: int) -> Tensor:
    """A mask of the `count` largest entries."""
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    mask[torch.argsort(score.reshape(-1), descending=True, stable=True)[:count]] = True
    return mask.reshape(score.shape)
