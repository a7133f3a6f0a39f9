"""Weights on their way to workers: a file each in the measured folder, which all machines see, gone when it has served.

Whatever the model came from (safetensors, GGUF, the hub), a worker reads one matrix from the disk and unpickles none.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import torch
from safetensors.torch import load_file
from torch import Tensor

from reallm.calibration.hidden_states import save_tensors
from reallm.errors import UserError
from reallm.models.loaded import LoadedModel, Matrix
from reallm.system.lock import exclusive_lock, remove_abandoned

PREFIX = "weights-"


@dataclass(frozen=True)
class Handover:
    """A folder of weights that one run of `measure` has to itself."""

    folder: Path

    def put(self, loaded: LoadedModel, matrix: Matrix) -> Path:
        """Write the weight of `matrix` in the model's own dtype; the file's path, the same on every machine."""
        path = self._path(matrix.name)
        dtype = loaded.model.get_parameter(matrix.parameter).dtype
        save_tensors(path, {"weight": loaded.weight(matrix).to(dtype)})
        return path

    def drop(self, name: str) -> None:
        """The weight of matrix `name` has served."""
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


@contextmanager
def worker_weights_dir(output: Path) -> Iterator[Handover]:
    """A handover in the folder `output`; removes what runs that were killed have left of theirs."""
    remove_abandoned(output.glob(f"{PREFIX}*"))
    folder = (output / f"{PREFIX}{uuid4().hex[:12]}").absolute()
    try:
        with exclusive_lock(folder):
            yield Handover(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def take(path: Path) -> Tensor:
    """W[N, K] float32 that `Handover.put` wrote. Raises UserError on a machine that does not see the folder."""
    try:
        weight: Tensor = load_file(path)["weight"].to(torch.float32, copy=True)
    except FileNotFoundError:
        what = f"the worker on {socket.gethostname()} does not see {path.parent}"
        way_out = "expected the --output folder under the same path on every machine: take one on a shared file system"
        raise UserError(f"{what}; {way_out}") from None
    return weight
