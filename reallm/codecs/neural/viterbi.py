"""The search for the cheapest walk through the windows of a neural decoder: native code, or torch without a compiler.

Each patch of a column is decided by its window of codes, and the next window shifts one code in: a trellis whose states
are windows, so the codes of a whole column are chosen together, knowing the decoder (Viterbi; QTIP, arXiv 2406.11235).
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from reallm.codegen.cpu.compiler import library
from reallm.kernels.formats.codecs import NeuralCodec


def cheapest_walks(codec: NeuralCodec, target: Tensor, values: Tensor) -> Tensor:
    """Codes int64 [n, steps] whose windows' `values` [2^L, dim] come nearest to `target` [n, steps, dim] float32."""
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
        raise MemoryError if failed == 2 else ValueError(f"no walks for {codec.name}")
    return codes.long()


def _portable(codec: NeuralCodec, target: Tensor, values: Tensor, norms: Tensor) -> Tensor:
    count, steps, _ = target.shape
    choices = 1 << codec.codebook_bits
    pasts = len(values) // choices
    best = torch.full((count, pasts), torch.inf)
    best[:, 0] = 0
    came = torch.empty(steps, count, pasts, dtype=torch.int64)
    for t in range(steps):
        metric = best.repeat_interleave(choices, 1) + norms - target[:, t] @ values.T
        best, came[t] = metric.view(count, choices, pasts).min(1)
    past = best.argmin(1)
    codes = torch.empty(count, steps, dtype=torch.int64)
    for t in range(steps - 1, -1, -1):
        window = came[t].gather(1, past[:, None]).squeeze(1) * pasts + past
        codes[:, t] = window & (choices - 1)
        past = window >> codec.codebook_bits
    return codes
