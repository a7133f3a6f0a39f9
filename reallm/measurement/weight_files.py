"""Weights for the workers: one file per matrix in the work folder, to which every machine has access.

Workers read only the matrix they need, in the same way whatever the model was loaded from (safetensors, GGUF, the hub),
and weights need not be pickled. A file is removed when its matrix has been measured.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import torch
from safetensors.torch import load_file
from torch import Tensor

from reallm.errors import UserError
from reallm.models.matrix import Matrix
from reallm.system.lock import exclusive_lock, remove_abandoned
from reallm.system.tensor_file import save_tensors

if TYPE_CHECKING:  # at run time this would import transformers, which takes seconds in every worker
    from reallm.models.loaded import LoadedModel

PREFIX = "weights-"


@dataclass(frozen=True)
class WorkerWeights:
    """The folder of weight files that belongs to one run of `measure`."""

    folder: Path

    def write_weight(self, loaded: LoadedModel, matrix: Matrix) -> Path:
        """Write the weight of `matrix` in the model's dtype; returns the path, which must be valid on every machine."""
        path = self._path(matrix.name)
        dtype = loaded.model.get_parameter(matrix.parameter).dtype
        save_tensors(path, {"weight": loaded.weight(matrix).to(dtype)})
        return path

    def remove_weight(self, name: str) -> None:
        """Remove the file of the matrix called `name`, once it has been measured."""
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


@contextmanager
def worker_weights_dir(output: Path) -> Iterator[WorkerWeights]:
    """Create a folder for weight files inside the folder `output`; it is removed when the context ends.

    Folders that killed runs left behind are removed too.
    """
    remove_abandoned(output.glob(f"{PREFIX}*"))
    folder = (output / f"{PREFIX}{uuid4().hex[:12]}").absolute()
    try:
        with exclusive_lock(folder):
            yield WorkerWeights(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_weight(path: Path) -> Tensor:
    """Read W[N, K] float32 from a file of `WorkerWeights`. Raises UserError if this machine has no access to it."""
    try:
        weight: Tensor = load_file(path)["weight"].to(torch.float32, copy=True)
    except FileNotFoundError:
        what = f"the worker on {socket.gethostname()} cannot access {path.parent}"
        way_out = "expected the --output folder under the same path on every machine: use one on a shared file system"
        raise UserError(f"{what}; {way_out}") from None
    return weight
