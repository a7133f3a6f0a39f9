"""Tensors in files instead of memory: what is too large to be kept in memory, but must be computed with.

A scratch tensor is a file that is mapped into memory and already removed from its folder. It is computed with as any
other tensor; the kernel writes its pages to the disk when memory is short and reads them when they are used. The disk
space is taken at once, so that a full disk is found before the work begins, and it is given back when the last tensor
of the file is gone, also after kill -9.
"""

from __future__ import annotations

import errno
import math
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
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".scratch-") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise
                raise UserError(f"{self.folder}: no space for {count * dtype.itemsize} bytes; free some disk space, or "
                                "set TMPDIR to a folder on a larger disk") from None  # fmt: skip
            flat = torch.from_file(file.name, shared=True, size=count, dtype=dtype)
        return flat.view(tuple(shape))

    def copy(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A copy of `tensor` in a file, in `dtype` or its own. Raises UserError if the disk has no space for it."""
        result = self.zeros(tensor.shape, dtype or tensor.dtype)
        return result.copy_(tensor.detach())


def is_in_file(tensor: Tensor) -> bool:
    """Whether `tensor` is in a mapped file, a weights file of safetensors or a scratch file, instead of in memory.

    torch cannot resize the storage of such a tensor, because it did not allocate it.
    """
    return not tensor.untyped_storage().resizable()
