"""What an artifact puts into a GGUF file: the tensor of every packed matrix, and proof that the base is its model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reallm.artifacts.directory import read_record_of
from reallm.artifacts.stored_values import read_floats, read_tensors
from reallm.errors import UserError
from reallm.kernels.storage.dtypes import SAFETENSORS_FLOATS
from reallm.kernels.storage.safetensors_reader import StoredTensor

from .file_header import GgufHeader, GgufTensor
from .packed_matrix import PackedMatrix, packed_matrices
from .tensor_names import base_values, name_finder, relative_error, row_orders

OTHER_MODEL = 0.9
"""A base whose matrix differs from the artifact's by more than this share of its norm is another model's."""
SAME_VALUES = 0.01
"""Up to this relative error a tensor that is not packed has the base's values: rounding to bfloat16 gives 0.002."""


@dataclass(frozen=True)
class Contents:
    """The tensors that replace those of the base, and remarks about the others."""

    matrices: Mapping[str, PackedMatrix]
    """Tensor name in the file -> matrix."""
    orders: Mapping[str, NDArray[np.int64]]
    """Tensor name in the file -> order of its rows."""
    stored: Mapping[str, StoredTensor]
    notes: tuple[str, ...]


def read_contents(folder: Path, base: GgufHeader) -> Contents:
    """Find the place in `base` of everything in the artifact `folder`, and compare their values.

    Raises UserError for a format that no GGUF type holds, and for a base of another model.
    """
    stored, record = read_tensors(folder), read_record_of(folder)
    find, places = name_finder(base), {tensor.name: tensor for tensor in base.tensors}
    matrices, orders = {}, {}
    for matrix in packed_matrices(folder, stored, record):
        heads = [head for head, embedding in record.tied.items() if embedding == matrix.name]
        targets = [name for owner in (matrix.name, *heads) if (name := find(f"{owner}.weight"))]
        if not targets or find(f"{matrix.name}.weight") is None:
            raise UserError(f"{base.path} has no tensor of its own for {matrix.name}; give a GGUF file of this model")
        weight = matrix.weight(stored)
        for target in targets:
            matrices[target] = matrix
            orders[target] = _order(base, places[target], matrix.name, weight, OTHER_MODEL)[0]
    notes = _compare_dense(base, stored, find, set(matrices), {m.stored_as for m in matrices.values()})
    return Contents(matrices, orders, stored, notes)


def _order(
    base: GgufHeader, place: GgufTensor, name: str, values: NDArray[np.float32], limit: float
) -> tuple[NDArray[np.int64], float]:
    """The order of rows in which `values` are nearest to the base's, and the relative error. Raises UserError."""
    if place.shape != values.shape:
        raise UserError(
            f"{base.path}: {place.name} is {list(place.shape)}, {name} is {list(values.shape)}; "
            "give a GGUF file of this model"
        )
    expected = base_values(base, place)
    errors = [(relative_error(values[order], expected), order) for order in row_orders(base.values, place).values()]
    error, order = min(errors, key=lambda item: item[0])
    if error > limit:
        raise UserError(
            f"{base.path}: {place.name} differs from {name} by {error:.0%} of its norm, at most {limit:.0%} is "
            "accepted; give a GGUF file of the model that the artifact was made from"
        )
    return order, error


def _compare_dense(
    base: GgufHeader,
    stored: Mapping[str, StoredTensor],
    find: Callable[[str], str | None],
    replaced: set[str],
    packed: set[str],
) -> tuple[str, ...]:
    """Check that the tensors which are not packed are the base's, whose bytes are kept; remarks where they differ."""
    places, errors, seen = {tensor.name: tensor for tensor in base.tensors}, {}, set(replaced)
    for name, tensor in stored.items():
        if name.rpartition(".")[0] in packed and tensor.dtype == "U8":
            continue
        target = find(name)
        if target is None or tensor.dtype not in SAFETENSORS_FLOATS:
            raise UserError(f"{base.path} has no tensor for {name}; give a GGUF file of this model")
        values = np.asarray(read_floats(tensor), dtype=np.float32).reshape(tensor.shape)
        limit = OTHER_MODEL if len(tensor.shape) > 1 else SAME_VALUES
        errors[name] = _order(base, places[target], name, values, limit)[1]
        seen.add(target)
    alone = [tensor.name for tensor in base.tensors if tensor.name not in seen]
    if unknown := [name for name in alone if name.startswith("blk.") and name.endswith(".weight")]:
        raise UserError(f"{base.path} has {unknown[0]}, which the artifact has not; give a GGUF file of this model")
    notes = [f"{name} is not in the artifact; the base's is kept." for name in alone]
    for name, error in errors.items():
        if error > SAME_VALUES:
            notes.append(
                f"{name} keeps the base's values, which differ from the artifact's by {error:.1%} of its norm."
            )
    return tuple(notes)
