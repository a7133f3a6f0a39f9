"""One scale for every block of TILE columns, fitted to given codes by least squares in the metric of an encoder."""

from __future__ import annotations

import torch
from torch import Tensor

from reallm.kernels.formats.codecs import TILE

RIDGE = 1e-6


def refit_block_scales(W: Tensor, plain: Tensor, scales: Tensor, H: Tensor, G: Tensor | None) -> Tensor:
    """Scales [K / TILE] minimising tr(G E H E^T), E = W - plain diag(scales); `scales` where that is singular.

    W and `plain` are float32 [N, K], K a multiple of TILE; without G [N, N] it is the identity.
    """
    weighted = plain if G is None else G @ plain
    gram = _block_sums((plain.T @ weighted) * H)
    right = ((W @ H) * weighted).sum(0, dtype=torch.float64).reshape(-1, TILE).sum(1)
    ridge = RIDGE * gram.diagonal().mean().clamp_min(1e-30)
    system = gram + ridge * torch.eye(len(gram), dtype=torch.float64)
    solved, failed = torch.linalg.solve_ex(system, right + ridge * scales)
    usable = not int(failed) and bool(torch.isfinite(solved).all())
    return solved.float() if usable else scales


def _block_sums(values: Tensor) -> Tensor:
    """Sums over TILE x TILE blocks, float64."""
    blocks = values.shape[0] // TILE
    return values.reshape(blocks, TILE, blocks, TILE).double().sum((1, 3))


def padded(H: Tensor, size: int) -> Tensor:
    """H with ones on the diagonal where there is nothing."""
    missing = size - len(H)
    if not missing:
        return H
    result = torch.eye(size, dtype=H.dtype)
    result[: len(H), : len(H)] = H
    return result
