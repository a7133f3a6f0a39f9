"""The rotations of `kernels.codes.hadamard`, by Kronecker factors: n (m + 128) products per vector instead of n^2."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reallm.kernels.codes.hadamard import factors, signs, sylvester

MAX_SYLVESTER = 7
"""Base-2 logarithm of the size of the largest Sylvester matrix that is applied in one product."""


def _kronecker(n: int, like: Tensor) -> list[Tensor]:
    """Orthogonal factors whose Kronecker product is R without its signs."""
    base, power = factors(n)
    parts, remaining = [torch.from_numpy(base.copy()) / len(base) ** 0.5], power.bit_length() - 1
    while remaining:
        exponent = math.ceil(remaining / math.ceil(remaining / MAX_SYLVESTER))  # factors of about equal size
        parts.append(torch.from_numpy(sylvester(1 << exponent)) / 2 ** (exponent / 2))
        remaining -= exponent
    return [part.to(like) for part in parts if len(part) > 1]


def _apply(x: Tensor, parts: list[Tensor], inner: int = 1) -> Tensor:
    """Apply kron(parts) along the dimension of x that has `inner` entries behind it: one batched product per factor."""
    shape, stride = x.shape, inner * math.prod(len(part) for part in parts)
    for part in parts:
        stride //= len(part)
        x = x.reshape(-1, len(part)) @ part.T if stride == 1 else part @ x.reshape(-1, len(part), stride)
    return x.reshape(shape)


def _signs(n: int, like: Tensor) -> Tensor:
    return torch.from_numpy(signs(n).copy()).to(like)


def rotate(x: Tensor) -> Tensor:
    """Rotate every vector x along the last dimension, R x, in the dtype of x."""
    n = x.shape[-1]
    return _apply(x * _signs(n, x), _kronecker(n, x))


def unrotate(x: Tensor) -> Tensor:
    """Rotate every vector x along the last dimension back, R^T x, in the dtype of x."""
    n = x.shape[-1]
    return _apply(x, [part.T for part in _kronecker(n, x)]) * _signs(n, x)


def _rotate_rows(W: Tensor) -> Tensor:
    """R_N W for W[N, K]."""
    n = len(W)
    return _apply(W * _signs(n, W)[:, None], _kronecker(n, W), W.shape[1])


def _unrotate_rows(W: Tensor) -> Tensor:
    """R_N^T W for W[N, K]."""
    n = len(W)
    return _apply(W, [part.T for part in _kronecker(n, W)], W.shape[1]) * _signs(n, W)[:, None]


def rotate_both(W: Tensor) -> Tensor:
    """Rotate both sides of W[N, K]: R_N W R_K^T."""
    return _rotate_rows(_rotate_rows(W).T.contiguous()).T


def unrotate_both(W: Tensor) -> Tensor:
    """Undo `rotate_both` for W[N, K]: R_N^T W R_K."""
    return _unrotate_rows(_unrotate_rows(W).T.contiguous()).T
