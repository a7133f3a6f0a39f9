"""Sizes of an artifact that transformers loaded and saved again."""

from __future__ import annotations

import math
from pathlib import Path

from reallm.models.sizes import Sizes
from reallm.planner.tables.tensor_layout import SHARED_PREFIX

from .saved_copy import copied_matrices
from .stored_values import read_tensors


def copy_sizes(folder: Path) -> Sizes:
    """Sizes of a saved copy; its matrices are those that are packed."""
    tensors = read_tensors(folder)
    matrices = copied_matrices(folder, tensors)
    weights = sum(matrix.rows * matrix.cols for matrix in matrices)
    packed = {f"{m.stored_as}.{field.name}" for m in matrices for field in m.format.fields(m.rows, m.cols)}
    shared = [tensor.nbytes for name, tensor in tensors.items() if name.startswith(SHARED_PREFIX)]
    others = [t for name, t in tensors.items() if name not in packed and not name.startswith(SHARED_PREFIX)]
    return Sizes(
        matrices_bytes=sum(matrix.nbytes for matrix in matrices) + sum(shared),
        matrices_weights=weights,
        weights_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        weights=weights + sum(math.prod(tensor.shape) for tensor in others),
        file_bytes=sum(path.stat().st_size for path in {tensor.path for tensor in tensors.values()}),
    )
