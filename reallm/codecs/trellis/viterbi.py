"""The search for the closed walks of one block of columns: native code, or torch where there is no compiler.

Both minimise the squared error of every tile over all walks that end where they began, in two passes: a free one around
the tile's ends to find the bits both share, then one held to them (QTIP, arXiv 2406.11235). The portable one keeps its
metrics in float32, so its walks can differ from the native ones where two are equally good.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reallm.codegen.cpu.compiler import library
from reallm.kernels.codes.trellis import CODE_STD, code_table, step_shape
from reallm.kernels.formats.codecs import TILE

SEAM = 128


def closed_walks(
    target: Tensor, state_bits: int, width: int, clip: float, below: Tensor | None
) -> tuple[Tensor, NDArray[np.uint16]]:
    """(values [16 t, 16], walks [t, n]) for the tiles of `target` [16 t, 16], in deviations of the code.

    `below` [t, 16 t, 16] spreads the error of a tile onto the rows below it; `clip` bounds the distances of the search.
    """
    native = library("trellis")
    if native is None:
        return _portable(target, state_bits, width, below)
    values_a_step, _, steps = step_shape(width)
    tiles = len(target) // TILE
    states, values = np.empty((tiles, steps), dtype=np.uint16), torch.empty_like(target)
    code = code_table(state_bits, values_a_step)
    failed = native.reallm_trellis_block(
        ctypes.c_void_p(target.contiguous().data_ptr()),
        ctypes.c_int64(tiles),
        ctypes.c_int(state_bits),
        ctypes.c_int(width),
        ctypes.c_void_p(code.ctypes.data),
        ctypes.c_float(CODE_STD),
        ctypes.c_float(clip),
        ctypes.c_void_p(None if below is None else below.data_ptr()),
        ctypes.c_void_p(values.data_ptr()),
        ctypes.c_void_p(states.ctypes.data),
    )
    if failed:
        raise MemoryError if failed == 2 else ValueError(f"no trellis of {state_bits} state bits and width {width}")
    return values, states


def _portable(target: Tensor, state_bits: int, width: int, below: Tensor | None) -> tuple[Tensor, NDArray[np.uint16]]:
    per_step, bits, steps = step_shape(width)
    code = torch.from_numpy(code_table(state_bits, per_step).copy()).float() / CODE_STD
    rest, values = target.clone(), torch.empty_like(target)
    tiles = len(target) // TILE
    together = 1 if below is not None else tiles
    walks = np.empty((tiles, steps), dtype=np.uint16)
    for first in range(0, tiles, together):
        span = slice(first * TILE, (first + together) * TILE)
        x = rest[span].reshape(together, steps, per_step)
        found = search(x, code, bits)
        walks[first : first + together] = found.numpy().astype(np.uint16)
        values[span] = code[found].reshape(-1, TILE)
        if below is not None:
            rest[span.stop :] -= below[first, span.stop :] @ (rest[span] - values[span])
    return values, walks


def search(x: Tensor, code: Tensor, bits: int) -> Tensor:
    """Closed walks [t, n] for x [t, n, V] over `code` [2^L, V]."""
    steps, half = x.shape[1], min(SEAM, x.shape[1]) // 2
    around = torch.cat([x[:, steps - half :], x[:, :half]], 1)
    shared = _viterbi(around, code, bits, None)[:, half] >> bits
    return _viterbi(x, code, bits, shared)


def _viterbi(x: Tensor, code: Tensor, bits: int, shared: Tensor | None) -> Tensor:
    tiles, steps, _ = x.shape
    states, branches = len(code), 1 << bits
    groups = states // branches
    best, metric = torch.zeros(tiles, groups), torch.empty(0)
    if shared is not None:
        best = torch.full_like(best, torch.inf).scatter_(1, shared[:, None], 0.0)
    came = torch.zeros(steps, tiles, groups, dtype=torch.int64)
    for t in range(steps):
        if t:
            best, came[t] = metric.reshape(tiles, branches, groups).min(1)
        distance = (x[:, t, None, :] - code).square().sum(2)
        metric = best.repeat_interleave(branches, 1) + distance
    if shared is not None:
        allowed = torch.arange(states) % groups == shared[:, None]
        metric = metric.masked_fill(~allowed, torch.inf)
    state = metric.argmin(1)
    walk = torch.empty(tiles, steps, dtype=torch.int64)
    for t in range(steps - 1, -1, -1):
        walk[:, t] = state
        if t:
            group = state >> bits
            state = came[t].gather(1, group[:, None]).squeeze(1) * groups + group
    return walk
