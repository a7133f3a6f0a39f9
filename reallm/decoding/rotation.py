"""The rotations of `kernels.codes.hadamard`, applied by Kronecker factors.

This takes n (m + 128) multiplications per vector of n = 2^k m entries instead of n^2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reallm.kernels.codes.hadamard import factors, signs, sylvester

PANEL = 1024
"""Columns or rows that are rotated at a time in place."""
MAX_SYLVESTER = 7
"""Base-2 logarithm of the size of the largest Sylvester matrix that is applied in one product."""


def _kronecker(n: int, like: Tensor) -> list[Tensor]:
    """Orthogonal factors whose Kronecker product is the rotation R [n, n] without its random signs."""
    base, power = factors(n)
    parts, remaining = [torch.from_numpy(base.copy()) / len(base) ** 0.5], power.bit_length() - 1
    while remaining:
        exponent = math.ceil(remaining / math.ceil(remaining / MAX_SYLVESTER))  # factors of about equal size
        parts.append(torch.from_numpy(sylvester(1 << exponent)) / 2 ** (exponent / 2))
        remaining -= exponent
    return [part.to(like) for part in parts if len(part) > 1]


def _apply(x: Tensor, parts: list[Tensor], inner: int = 1) -> Tensor:
    """Multiply x by kron(parts) along one dimension, by one batched product per factor.

    `inner` is the number of entries of x in the dimensions after that one.
    """
    shape, stride = x.shape, inner * math.prod(len(part) for part in parts)
    for part in parts:
        stride //= len(part)
        x = x.reshape(-1, len(part)) @ part.T if stride == 1 else part @ x.reshape(-1, len(part), stride)
    return x.reshape(shape)


def _signs(n: int, like: Tensor) -> Tensor:
    return torch.from_numpy(signs(n).copy()).to(like)


def rotate(x: Tensor) -> Tensor:
    """Rotate the vectors along the last dimension of x: R x, in the dtype of x."""
    n = x.shape[-1]
    return _apply(x * _signs(n, x), _kronecker(n, x))


def unrotate(x: Tensor) -> Tensor:
    """Undo `rotate`: R^T x along the last dimension of x, in the dtype of x."""
    n = x.shape[-1]
    return _apply(x, [part.T for part in _kronecker(n, x)]) * _signs(n, x)


def _rotate_rows(W: Tensor) -> Tensor:
    """The product R_N W for W[N, K]."""
    n = len(W)
    return _apply(W * _signs(n, W)[:, None], _kronecker(n, W), W.shape[1])


def _unrotate_rows(W: Tensor) -> Tensor:
    """The product R_N^T W for W[N, K]."""
    n = len(W)
    return _apply(W, [part.T for part in _kronecker(n, W)], W.shape[1]) * _signs(n, W)[:, None]


def rotate_both(W: Tensor) -> Tensor:
    """Rotate both sides of W[N, K]: R_N W R_K^T."""
    return _rotate_rows(_rotate_rows(W).T.contiguous()).T


def rotate_in_place(H: Tensor) -> Tensor:
    """Replace H [n, n] by R H R^T, a panel of columns and then a panel of rows at a time, to save memory; returns H.

    It differs from `rotate_both` by rounding errors.
    """
    for start in range(0, len(H), PANEL):
        panel = slice(start, start + PANEL)
        H[:, panel] = _rotate_rows(H[:, panel])
    for start in range(0, len(H), PANEL):
        panel = slice(start, start + PANEL)
        H[panel] = _rotate_rows(H[panel].T).T
    return H


def unrotate_both(W: Tensor) -> Tensor:
    """Undo `rotate_both` for W[N, K]: R_N^T W R_K."""
    return _unrotate_rows(_unrotate_rows(W).T.contiguous()).T
