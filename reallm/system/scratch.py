"""Tensors in files instead of memory: what is too large to be kept in memory, but must be computed with.

A scratch tensor is a file that is mapped into memory and already removed from its folder. It is computed with as any
other tensor; the kernel writes its pages to the disk when memory is short and reads them when they are used. The disk
space is taken at once, so that a full disk is found before the work begins, and it is given back when the last tensor
of the file is gone, also after kill -9.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from reallm.errors import UserError


@dataclass(frozen=True)
class Scratch:
    """A folder on a disk for tensors that do not fit into memory."""

    folder: Path

    @classmethod
    def default(cls) -> Scratch:
        """The system's folder for temporary files, which the environment variable TMPDIR names."""
        return cls(Path(tempfile.gettempdir()))

    def zeros(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor of zeros in a file. Raises UserError if the disk has no space for it."""
        count = math.prod(shape)
        if not count:
            return torch.zeros(tuple(shape), dtype=dtype)
        nbytes = count * dtype.itemsize
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.folder) as file:
            self._reserve(file.fileno(), nbytes)
            mapped = mmap.mmap(file.fileno(), nbytes)
        return torch.frombuffer(mapped, dtype=dtype).view(tuple(shape))

    def _reserve(self, file: int, nbytes: int) -> None:
        """Make the open file `nbytes` long. Raises UserError if the disk has no space for it."""
        if not hasattr(os, "posix_fallocate"):  # macOS: a full disk is found when the pages are written
            os.ftruncate(file, nbytes)
            return
        try:
            os.posix_fallocate(file, 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            what = f"{self.folder}: no space for {nbytes} bytes"
            raise UserError(f"{what}; free some disk space, or set TMPDIR to a folder on a larger disk") from None

    def copy(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A copy of `tensor` in a file, in `dtype` or its own. Raises UserError if the disk has no space for it."""
        result = self.zeros(tensor.shape, dtype or tensor.dtype)
        return result.copy_(tensor.detach())


def is_in_file(tensor: Tensor) -> bool:
    """Whether `tensor` is in a mapped file, a weights file of safetensors or a scratch file, instead of in memory.

    torch cannot resize the storage of such a tensor, because it did not allocate it.
    """
    return not tensor.untyped_storage().resizable()
