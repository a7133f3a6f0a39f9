"""Rotations of `kernels.hadamard` applied by their Kronecker factors, n (m + 64) products a vector instead of n^2."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.hadamard import factors, signs, sylvester

SPLIT = 64
"""Largest Sylvester matrix that is applied in one product."""


def _kronecker(n: int, like: Tensor) -> list[Tensor]:
    """The factors whose Kronecker product is R without its signs, scaled to be orthogonal."""
    base, power = factors(n)
    parts = [torch.from_numpy(base.copy()) / len(base) ** 0.5]
    while power > 1:
        size = min(power, SPLIT)
        parts.append(torch.from_numpy(sylvester(size)) / size**0.5)
        power //= size
    return [part.to(like) for part in parts if len(part) > 1]


def _apply(x: Tensor, parts: list[Tensor]) -> Tensor:
    """kron(parts) to the last dimension of x."""
    shape, left = x.shape, x.shape[-1]
    for part in parts:
        left //= len(part)
        x = part @ x.reshape(-1, len(part), left)
    return x.reshape(shape)


def rotate(x: Tensor) -> Tensor:
    """R x for every vector of the last dimension, in the dtype of x."""
    n = x.shape[-1]
    return _apply(x * torch.from_numpy(signs(n).copy()).to(x), _kronecker(n, x))


def unrotate(x: Tensor) -> Tensor:
    """R^T x for every vector of the last dimension, in the dtype of x."""
    n = x.shape[-1]
    parts = [part.T for part in _kronecker(n, x)]
    return _apply(x, parts) * torch.from_numpy(signs(n).copy()).to(x)


def rotate_both(W: Tensor) -> Tensor:
    """R_N W R_K^T of W[N, K]."""
    return rotate(rotate(W).T.contiguous()).T


def unrotate_both(W: Tensor) -> Tensor:
    """R_N^T W R_K of W[N, K]."""
    return unrotate(unrotate(W).T.contiguous()).T
