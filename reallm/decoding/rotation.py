"""Rotations of `kernels.hadamard` applied by their Kronecker factors: n (m + 128) products a vector instead of n^2."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reallm.kernels.codes.hadamard import factors, signs, sylvester

MAX_SYLVESTER = 7
"""Binary logarithm of the largest Sylvester matrix that is applied in one product."""


def _kronecker(n: int, like: Tensor) -> list[Tensor]:
    """The factors whose Kronecker product is R without its signs, scaled to be orthogonal."""
    base, power = factors(n)
    parts, left = [torch.from_numpy(base.copy()) / len(base) ** 0.5], power.bit_length() - 1
    while left:
        take = math.ceil(left / math.ceil(left / MAX_SYLVESTER))  # even shares
        parts.append(torch.from_numpy(sylvester(1 << take)) / 2 ** (take / 2))
        left -= take
    return [part.to(like) for part in parts if len(part) > 1]


def _apply(x: Tensor, parts: list[Tensor], inner: int = 1) -> Tensor:
    """kron(parts) to the dimension of x that is followed by `inner` entries: one batch of products a factor."""
    shape, left = x.shape, inner * math.prod(len(part) for part in parts)
    for part in parts:
        left //= len(part)
        x = x.reshape(-1, len(part)) @ part.T if left == 1 else part @ x.reshape(-1, len(part), left)
    return x.reshape(shape)


def _signs(n: int, like: Tensor) -> Tensor:
    return torch.from_numpy(signs(n).copy()).to(like)


def rotate(x: Tensor) -> Tensor:
    """R x for every vector of the last dimension, in the dtype of x."""
    n = x.shape[-1]
    return _apply(x * _signs(n, x), _kronecker(n, x))


def unrotate(x: Tensor) -> Tensor:
    """R^T x for every vector of the last dimension, in the dtype of x."""
    n = x.shape[-1]
    return _apply(x, [part.T for part in _kronecker(n, x)]) * _signs(n, x)


def _rotate_rows(W: Tensor) -> Tensor:
    """R_N W of W[N, K]."""
    n = len(W)
    return _apply(W * _signs(n, W)[:, None], _kronecker(n, W), W.shape[1])


def _unrotate_rows(W: Tensor) -> Tensor:
    """R_N^T W of W[N, K]."""
    n = len(W)
    return _apply(W, [part.T for part in _kronecker(n, W)], W.shape[1]) * _signs(n, W)[:, None]


def rotate_both(W: Tensor) -> Tensor:
    """R_N W R_K^T of W[N, K]."""
    return _rotate_rows(_rotate_rows(W).T.contiguous()).T


def unrotate_both(W: Tensor) -> Tensor:
    """R_N^T W R_K of W[N, K]."""
    return _unrotate_rows(_unrotate_rows(W).T.contiguous()).T
