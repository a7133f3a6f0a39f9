"""Viterbi search for the codes of whole columns under a given neural decoder (as QTIP does, arXiv 2406.11235).

A window of codes decides one patch, and the window of the next patch is obtained by shifting in one more code. This is
a trellis whose states are windows, so the best codes of a column are the cheapest walk through the trellis. The search
runs in native code, or in torch where there is no C++ compiler.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from reallm.codegen.cpu.compiler import library
from reallm.kernels.formats.codecs import NeuralCodec


def cheapest_codes(codec: NeuralCodec, target: Tensor, values: Tensor) -> Tensor:
    """Choose the codes, int64 [n, steps], whose decoded patches are nearest to `target` [n, steps, dim] float32.

    `values` [2^L, dim] holds the decoded patch of every window of L bits (see `decoding.neural.window_values`).
    """
    native = library("neural")
    norms = 0.5 * values.square().sum(1)
    if native is None:
        return _portable(codec, target, values, norms)
    target, columns = target.contiguous(), values.T.contiguous()
    codes = torch.empty(target.shape[:2], dtype=torch.int32)
    failed = native.reallm_neural_walks(
        ctypes.c_void_p(target.data_ptr()),
        ctypes.c_int64(target.shape[0]),
        ctypes.c_int64(target.shape[1]),
        ctypes.c_int(codec.dim),
        ctypes.c_int(codec.window_bits),
        ctypes.c_int(codec.codebook_bits),
        ctypes.c_void_p(columns.data_ptr()),
        ctypes.c_void_p(norms.data_ptr()),
        ctypes.c_void_p(codes.data_ptr()),
    )
    if failed:
        raise MemoryError if failed == 2 else ValueError(f"the native search does not support {codec.name}")
    return codes.long()


def _portable(codec: NeuralCodec, target: Tensor, values: Tensor, norms: Tensor) -> Tensor:
    count, steps, _ = target.shape
    choices = 1 << codec.codebook_bits
    suffixes = len(values) // choices  # number of windows without their oldest code; the next window keeps this part
    best = torch.full((count, suffixes), torch.inf)
    best[:, 0] = 0
    oldest = torch.empty(steps, count, suffixes, dtype=torch.int64)
    for t in range(steps):
        metric = best.repeat_interleave(choices, 1) + norms - target[:, t] @ values.T
        best, oldest[t] = metric.view(count, choices, suffixes).min(1)
    suffix = best.argmin(1)
    codes = torch.empty(count, steps, dtype=torch.int64)
    for t in range(steps - 1, -1, -1):
        window = oldest[t].gather(1, suffix[:, None]).squeeze(1) * suffixes + suffix
        codes[:, t] = window & (choices - 1)
        suffix = window >> codec.codebook_bits
    return codes
