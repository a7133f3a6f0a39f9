"""A table of levels for every row, by weighted k-means (SqueezeLLM, arXiv 2306.07629)."""

from __future__ import annotations

import torch
from torch import Tensor

from reallm.kernels.codecs import KMeansCodec

from .metric import Workspace
from .stored import to_half

ITERATIONS = 20


def encode_kmeans(W: Tensor, codec: KMeansCodec, feedback: bool, work: Workspace) -> tuple[dict[str, Tensor], Tensor]:
    """(fields, what they decode to) for W[N, K]: Lloyd's iterations from weighted quantiles, weights diag(H)."""
    weight = work.column_weight.expand_as(W)
    values, order = W.sort(1)
    share = weight.gather(1, order).cumsum(1)
    share = share / share[:, -1:]
    targets = (torch.arange(1 << codec.bits) + 0.5) / (1 << codec.bits)
    found = torch.searchsorted(share.contiguous(), targets.expand(len(W), -1).contiguous()).clamp_max(W.shape[1] - 1)
    levels = values.gather(1, found)
    for _ in range(ITERATIONS):
        codes = _nearest(W, levels)
        mass = torch.zeros_like(levels).scatter_add_(1, codes, weight)
        total = torch.zeros_like(levels).scatter_add_(1, codes, weight * W)
        levels = torch.where(mass > 0, total / mass.clamp_min(1e-30), levels).sort(1).values
    levels = to_half(levels).sort(1).values
    codes = _nearest(W, levels)
    return {"codes": codes, "levels": levels}, levels.gather(1, codes)


def _nearest(W: Tensor, levels: Tensor) -> Tensor:
    edges = (levels[:, 1:] + levels[:, :-1]) / 2
    return torch.searchsorted(edges.contiguous(), W.contiguous())
