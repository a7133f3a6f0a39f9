"""Scales of blocks of TILE columns, fitted to given codes by least squares in the metric of the encoder."""

from __future__ import annotations

import torch
from torch import Tensor

from reallm.kernels.formats.codecs import TILE

RIDGE = 1e-6  # strength of the pull towards the previous scale, in units of the mean curvature


def refit_block_scales(W: Tensor, plain: Tensor, scales: Tensor, H: Tensor, G: Tensor | None) -> Tensor:
    """Fit scales [K / TILE] that minimise tr(G E H E^T), where E = W - plain diag(scales), one scale per TILE columns.

    W[N, K] and the unscaled decoded codes `plain` [N, K] are float32; K is a multiple of TILE. G is [N, N]; None
    stands for the identity. If the system is singular, the previous `scales` are returned.
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
    """Sums over blocks of TILE x TILE entries of a square matrix, float64 [blocks, blocks]."""
    blocks = values.shape[0] // TILE
    return values.reshape(blocks, TILE, blocks, TILE).double().sum((1, 3))


def padded(H: Tensor, size: int) -> Tensor:
    """Extend H[n, n] to [size, size], with ones on the new part of the diagonal and zeros elsewhere."""
    missing = size - len(H)
    if not missing:
        return H
    result = torch.eye(size, dtype=H.dtype)
    result[: len(H), : len(H)] = H
    return result
