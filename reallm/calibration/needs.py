"""What calibrating a model that does not fit into memory takes, estimated before it starts."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from reallm.errors import UserError
from reallm.models.conversion import tensors_of
from reallm.models.loaded import LoadedModel
from reallm.models.matrix import Matrix
from reallm.system.memory import available_memory

from .compute_dtype import compute_dtype
from .hooks import sums_nbytes

LOGITS = 5
"""Float32 copies of a window's logits that the loss and its gradient take."""
ACTIVATIONS = 24
"""Values per token that a block keeps for its gradient, in units of its widest input or output."""
GIB = 1 << 30


@dataclass(frozen=True)
class Needs:
    """Bytes of memory and of disk."""

    memory: int
    disk: int


def calibration_needs(loaded: LoadedModel, windows: int, seqlen: int) -> Needs:
    """What calibrating `loaded` block by block on `windows` windows of `seqlen` tokens takes.

    Memory is that of the largest block in the dtype to compute in, the sums of the largest matrix inside a block, and
    one window's activations and logits; pages of files, which the kernel drops when memory is short, do not count. Disk
    is that of the statistics and of the blocks' results.
    """
    itemsize = compute_dtype(loaded).itemsize
    blocks = [loaded.model.get_submodule(path) for path in loaded.blocks]
    converted = itemsize != loaded.dtype.itemsize
    largest = max((sum(t.numel() for t in tensors_of(block)) * itemsize for block in blocks), default=0)
    inside = [matrix for matrix in loaded.matrices if matrix.block is not None]
    widest = max((max(matrix.rows, matrix.cols) for matrix in inside), default=0)
    hidden = Counter(matrix.cols for matrix in inside).most_common(1)[0][0] if inside else 0
    tokens = seqlen * (4 * LOGITS * (loaded.vocabulary or 0) + itemsize * ACTIVATIONS * widest)
    sums = max(map(sums_nbytes, inside), default=0)
    results = 4 * windows * seqlen * hidden * len(blocks)
    return Needs(largest * converted + sums + tokens, sum(map(_statistics_nbytes, loaded.matrices)) + results)


def _statistics_nbytes(matrix: Matrix) -> int:
    """Bytes of the statistics of one matrix on disk: H in float32, the Fisher information and G in bfloat16."""
    gram = matrix.rows**2 if matrix.kind in ("linear", "expert") else 0
    return 4 * matrix.cols**2 + 2 * matrix.numel + 2 * gram


def check_needs(loaded: LoadedModel, windows: int, seqlen: int, folder: Path) -> str:
    """A line for the user that says what calibrating takes, in `folder`.

    Raises UserError if the memory cannot be had. A disk that is too small is only said, because the pass continues
    where it stopped once there is space.
    """
    needs, available = calibration_needs(loaded, windows, seqlen), available_memory()
    if needs.memory > available:
        raise UserError(
            f"{loaded.source}: calibrating it block by block takes about {needs.memory / GIB:.1f} GiB of memory, "
            f"{available / GIB:.1f} GiB are available; use a shorter --seqlen, or a machine with more"
        )
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    line = (
        f"{loaded.source} does not fit into memory: its weights stay in their files and it is run block by block; this "
        f"takes about {needs.memory / GIB:.1f} of {available / GIB:.1f} GiB of memory and {needs.disk / GIB:.1f} GiB "
        "of disk"
    )
    if needs.disk > free:
        return f"{line}, of which only {free / GIB:.1f} are free: it will stop when the disk is full, and can continue"
    return line
