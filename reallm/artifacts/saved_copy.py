"""Artifacts that transformers loaded and saved again: they run, but have neither a plan nor hashes.

`save_pretrained` writes config.json and the weights. From these two, everything can be checked except whether a value
was changed: headers, names and sizes of all packed fields, padding, and that all values are finite.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reallm.errors import UserError
from reallm.kernels.formats.formats import Format
from reallm.kernels.storage.dtypes import SAFETENSORS_FLOATS
from reallm.kernels.storage.safetensors_reader import StoredTensor
from reallm.planner.tables.tensor_layout import shared_tensor

from .directory import read_record_of
from .stored_values import check_fields, check_values, read_bytes, read_floats, read_tensors


@dataclass(frozen=True)
class CopiedMatrix:
    """One packed matrix of a saved copy."""

    name: str
    rows: int
    cols: int
    format: Format
    stored_as: str
    """What the names of its tensors begin with; without the model's prefix if only a part of the model was saved."""

    @property
    def nbytes(self) -> int:
        """Bytes of its fields."""
        return self.format.nbytes(self.rows, self.cols)


def copied_matrices(folder: Path, tensors: Mapping[str, StoredTensor]) -> tuple[CopiedMatrix, ...]:
    """The packed matrices of a saved copy whose stored tensors are `tensors`.

    Raises UserError if config.json cannot be used, or if a field is missing or has another size than its format.
    """
    from .architecture import matrix_shapes  # builds the model without memory, for which it needs transformers

    record = read_record_of(folder)
    shapes = matrix_shapes(folder, record)
    matrices = []
    for name, fmt in record.matrices():
        rows, cols = shapes[name]
        first = fmt.fields(rows, cols)[0].name
        inner = name.partition(".")[2]
        stored_as = name if f"{name}.{first}" in tensors or f"{inner}.{first}" not in tensors else inner
        check_fields(folder, stored_as, fmt.fields(rows, cols), tensors)
        matrices.append(CopiedMatrix(name, rows, cols, fmt, stored_as))
    return tuple(matrices)


def check_copy(folder: Path, deep: bool) -> tuple[int, int]:
    """Check a saved copy as far as that is possible without hashes; returns the numbers of tensors and matrices.

    Raises UserError for a missing or damaged file, a field that is missing or has another size than its format, and, if
    `deep`, for padding that is not zero and values that are not finite.
    """
    record, tensors = read_record_of(folder), read_tensors(folder)
    matrices = copied_matrices(folder, tensors)
    for matrix in matrices:
        if deep:
            fields = matrix.format.fields(matrix.rows, matrix.cols)
            stored = [tensors[f"{matrix.stored_as}.{field.name}"] for field in fields]
            values = [(field, read_bytes(tensor)) for field, tensor in zip(fields, stored, strict=True)]
            check_values(matrix.name, values, stored[0].path)
    for key, fmt in record.shared_formats().items():
        assert fmt.shared_field is not None
        spec = shared_tensor(key, fmt.shared_field.nbytes)
        if (tensor := tensors.get(spec.name)) is None or (tensor.dtype, tensor.shape) != (spec.dtype, spec.shape):
            raise UserError(f"{folder}: the shared codebooks {key} are missing or do not have {spec.nbytes} bytes")
        if deep:
            check_values(key, [(fmt.shared_field, read_bytes(tensor))], tensor.path)
    if deep:
        _check_floats(tensors)
    return len(tensors), len(matrices)


def _check_floats(tensors: Mapping[str, StoredTensor]) -> None:
    """Raise UserError if a tensor of floats holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.dtype in SAFETENSORS_FLOATS and not np.isfinite(read_floats(tensor)).all():
            raise UserError(f"{tensor.path}: {name} holds NaN or infinity; save the model again")
