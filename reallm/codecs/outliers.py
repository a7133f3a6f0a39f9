"""Sparse outliers: weights that cost most to code are kept apart (SpQR, arXiv 2306.03078; SqueezeLLM, 2306.07629)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reallm.kernels.terms import Sparse

from .metric import Workspace
from .stored import to_half


@dataclass(frozen=True)
class Outliers:
    """Where they are, and the matrix without them."""

    mask: Tensor
    """bool [N, K]"""
    rest: Tensor
    """float32 [N, K]: W with zeros in their place."""

    def store(self, residual: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """(fields, what they add [N, K]) for W - decoded."""
        rows, cols = torch.nonzero(self.mask, as_tuple=True)
        values = to_half(residual[rows, cols])
        added = torch.zeros_like(residual)
        added[rows, cols] = values
        counts = torch.bincount(rows, minlength=len(residual))
        return {"sparse_counts": counts, "sparse_cols": cols, "sparse_values": values}, added


def find_outliers(W: Tensor, term: Sparse, work: Workspace) -> Outliers:
    """The weights of W[N, K] whose square, weighted by the diagonal of H, is largest; ties go to the earlier ones."""
    count = term.count(*W.shape)
    score = (W.square() * work.column_weight).reshape(-1)
    mask = torch.zeros(W.numel(), dtype=torch.bool)
    mask[torch.argsort(score, descending=True, stable=True)[:count]] = True
    mask = mask.reshape(W.shape)
    return Outliers(mask, W.masked_fill(mask, 0.0))
