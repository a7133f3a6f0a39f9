"""Viterbi search for the closed walks of one block of columns, in native code, or in torch without a C++ compiler.

Targets on a GPU are searched there by a Triton kernel with the native search's arithmetic (`device_search`). All
searches minimise the squared error of every tile over the walks that end in the state where they began. They do so in
two passes (QTIP, arXiv 2406.11235): an unconstrained walk around the seam, where the end of the tile meets its start,
finds the bits that the first and the last state have in common; the second pass searches with these bits fixed. The
torch search keeps its path metrics in float32, so its walks can differ from those of the native search where two walks
are equally good.
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

from .device_search import device_walks

SEAM = 128
"""Steps of the first pass, half of them on each side of the seam."""


def closed_walks(
    target: Tensor, state_bits: int, width: int, clip: float, below: Tensor | None
) -> tuple[Tensor, NDArray[np.uint16]]:
    """Find the closed walks for the t tiles of `target` [16 t, 16], which is in units of the code's standard deviation.

    `width` is the number of half bits per weight. `clip` bounds the distances in the native search. `below`
    [t, 16 t, 16] holds the coefficients of feedback from a tile to the rows below it (see `encode.feedback_below`);
    None for no feedback between tiles. Returns the decoded values [16 t, 16], on the device of `target`, and the states
    of the walks [t, steps].
    """
    if target.is_cuda:
        return device_walks(target, state_bits, width, clip, below)
    native = library("trellis")
    if native is None:
        return _portable(target, state_bits, width, below)
    values_per_step, _, steps = step_shape(width)
    tiles = len(target) // TILE
    states, values = np.empty((tiles, steps), dtype=np.uint16), torch.empty_like(target)
    code = code_table(state_bits, values_per_step)
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
        what = f"the native search does not support a trellis of {state_bits} state bits and width {width}"
        raise MemoryError if failed == 2 else ValueError(what)
    return values, states


def _portable(target: Tensor, state_bits: int, width: int, below: Tensor | None) -> tuple[Tensor, NDArray[np.uint16]]:
    per_step, bits, steps = step_shape(width)
    code = torch.from_numpy(code_table(state_bits, per_step).copy()).float() / CODE_STD
    remaining, values = target.clone(), torch.empty_like(target)
    tiles = len(target) // TILE
    batch = 1 if below is not None else tiles
    walks = np.empty((tiles, steps), dtype=np.uint16)
    for first in range(0, tiles, batch):
        span = slice(first * TILE, (first + batch) * TILE)
        states = search(remaining[span].reshape(batch, steps, per_step), code, bits)
        walks[first : first + batch] = states.numpy().astype(np.uint16)
        values[span] = code[states].reshape(-1, TILE)
        if below is not None:
            remaining[span.stop :] -= below[first, span.stop :] @ (remaining[span] - values[span])
    return values, walks


def search(x: Tensor, code: Tensor, bits: int) -> Tensor:
    """Find closed walks [t, n] for x [t, n, V], in states of `code` [2^L, V], with `bits` new bits per step."""
    steps, half = x.shape[1], min(SEAM, x.shape[1]) // 2
    around = torch.cat([x[:, steps - half :], x[:, :half]], 1)
    shared = _viterbi(around, code, bits, None)[:, half] >> bits
    return _viterbi(x, code, bits, shared)


def _viterbi(x: Tensor, code: Tensor, bits: int, shared: Tensor | None) -> Tensor:
    """The cheapest walks [t, n]; `shared` [t] fixes the bits that the first and last state have in common, if given."""
    tiles, steps, _ = x.shape
    states, branches = len(code), 1 << bits
    groups = states // branches
    best, metric = torch.zeros(tiles, groups), torch.empty(0)
    if shared is not None:
        best = torch.full_like(best, torch.inf).scatter_(1, shared[:, None], 0.0)
    branch = torch.zeros(steps, tiles, groups, dtype=torch.int64)
    for t in range(steps):
        if t:
            best, branch[t] = metric.reshape(tiles, branches, groups).min(1)
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
            state = branch[t].gather(1, group[:, None]).squeeze(1) * groups + group
    return walk
