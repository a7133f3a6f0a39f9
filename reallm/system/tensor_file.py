"""Atomic writing of tensors to safetensors files."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from reallm.kernels.storage.atomic import partial_path


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write `tensors` and `metadata` to the safetensors file `path`, which appears complete or not at all."""
    partial = partial_path(path)
    try:
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial, metadata)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
