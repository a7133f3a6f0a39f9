"""Runs the Triton search for closed walks on the GPU that holds the targets."""

from __future__ import annotations

import importlib.util
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reallm.errors import UserError
from reallm.kernels.codes.trellis import CODE_STD, TILE_WEIGHTS, code_table, step_shape
from reallm.kernels.formats.codecs import TILE

CLIP_UNITS = 255
"""The largest distance in quantised units; also in the native search and in `triton_search`."""
STATES_PER_THREAD = 16
MAX_WARPS = 32
"""With 2^16 states, a thread keeps 64 of them; some of its registers then spill to memory."""
INSTANCES = 4
"""Number of kernel instances per multiprocessor."""


def warps(state_bits: int) -> int:
    """Number of warps of an instance for 2^state_bits states; a thread keeps STATES_PER_THREAD of them, if possible."""
    return max(1, min(MAX_WARPS, (1 << state_bits) // STATES_PER_THREAD // 32))


def words_per_group(width: int) -> int:
    """Number of 32-bit words in which the kernel keeps the back pointers of one group of states for one tile."""
    _, bits, steps = step_shape(width)
    return -(-steps // (32 // bits))


@cache
def quantised_code(state_bits: int, values: int, clip: float) -> NDArray[np.int32]:
    """The values of every state in the search's units, int32 [V, 2^state_bits], rounded as by the native search."""
    unit = np.float32(CLIP_UNITS) / np.float32(clip)
    deviations = code_table(state_bits, values).T.astype(np.float32) / np.float32(CODE_STD)
    result: NDArray[np.int32] = np.rint(deviations * unit).astype(np.int32)
    result.setflags(write=False)
    return result


@cache
def _tables(state_bits: int, values: int, clip: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """The codes on `device`, [V, 2^state_bits]: quantised, and in standard deviations."""
    decoded = code_table(state_bits, values).T.astype(np.float32) / np.float32(CODE_STD)
    quantised = torch.from_numpy(quantised_code(state_bits, values, clip).copy())
    return quantised.to(device), torch.from_numpy(np.ascontiguousarray(decoded)).to(device)


def device_walks(
    target: Tensor, state_bits: int, width: int, clip: float, below: Tensor | None
) -> tuple[Tensor, NDArray[np.uint16]]:
    """As `viterbi.closed_walks`, on the device of `target`: the same codes as the native search.

    With feedback, one instance of the kernel codes all tiles in turn, otherwise many instances share the tiles. Raises
    UserError if Triton is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        raise UserError("encoding a trellis on a GPU needs Triton, which is missing; pip install 'reallm[triton]'")
    from .triton_search import search

    values_per_step, bits, steps = step_shape(width)
    tiles, device = len(target) // TILE, target.device
    target = target.contiguous()
    code, decoded = _tables(state_bits, values_per_step, clip, device)
    instances = 1 if below is not None else min(tiles, _instances(device))
    groups, words = 1 << (state_bits - bits), words_per_group(width)
    pointers = _pointers(instances, words, groups, device)
    states = torch.empty(tiles, steps, dtype=torch.int32, device=device)
    goal = torch.empty(tiles, TILE_WEIGHTS, dtype=torch.int32, device=device)
    values, error = torch.empty_like(target), torch.empty_like(target) if below is not None else target
    limit = float(np.float32(np.abs(code_table(state_bits, values_per_step)).max()) / np.float32(CODE_STD))
    factor = float(np.float32(CLIP_UNITS) / np.float32(clip))
    coefficients = target if below is None else below.to(device).contiguous()
    constants = {"STATE_BITS": state_bits, "BITS": bits, "VALUES": values_per_step, "FEEDBACK": below is not None}
    with torch.cuda.device(device if target.is_cuda else -1):
        search[(len(pointers),)](
            *(target, code, decoded, coefficients, error, goal, pointers, states, values, tiles, limit, factor),
            **constants,
            num_warps=warps(state_bits),
            enable_fp_fusion=False,  # so that feedback is rounded as in the native search
        )
    return values, states.cpu().numpy().astype(np.uint16)


def _pointers(instances: int, words: int, groups: int, device: torch.device) -> Tensor:
    """Memory for back pointers, int32 [instances, words, groups]; for fewer instances if the GPU has no more memory."""
    while True:
        try:
            return torch.empty(instances, words, groups, dtype=torch.int32, device=device)
        except torch.OutOfMemoryError:
            if instances == 1:
                raise
            instances = -(-instances // 2)


def _instances(device: torch.device) -> int:
    """Number of kernel instances that run at the same time."""
    if device.type != "cuda":
        return 3  # in Triton's interpreter
    return INSTANCES * torch.cuda.get_device_properties(device).multi_processor_count
