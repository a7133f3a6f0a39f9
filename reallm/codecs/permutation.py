"""A permutation of the columns that puts similar ones side by side (ReALLM, arXiv 2405.13155)."""

from __future__ import annotations

from torch import Tensor

from .metric import Workspace


def similar_columns(W: Tensor, work: Workspace) -> Tensor:
    """Columns of W[N, K] in coding order, int64 [K]."""
    return work.order
