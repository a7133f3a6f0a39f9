"""Random weights and metrics for the tests of codecs."""

from __future__ import annotations

import torch
from torch import Tensor

from reallm.codecs.metric import Metric


def correlated(rows: int, cols: int, seed: int, scale: float = 1.0) -> tuple[Tensor, Metric]:
    """W[N, K] float32, and a metric of strongly correlated inputs with uneven scales, as in a language model."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = (normal(4 * cols, max(1, cols // 4)) @ normal(max(1, cols // 4), cols)) + 0.3 * normal(4 * cols, cols)
    inputs = inputs * torch.exp(normal(cols) / 2)
    hessian = inputs.T @ inputs / len(inputs)
    fisher = torch.exp(normal(rows, 1)) * hessian.diagonal() * torch.rand(rows, cols, generator=generator)
    return scale * normal(rows, cols), Metric(hessian, fisher)
