"""Write an artifact as a GGUF file: a copy of the model's own GGUF file in which the packed matrices are replaced.

GGUF has its own order of rows for some matrices (q and k of llama). The base file proves it: of the orders that are
known, the one is taken in which the base's weights are nearest to the artifact's, and a base whose weights are far from
the artifact's in any order is refused.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reallm.artifacts.stored_values import read_tensors
from reallm.errors import UserError
from reallm.kernels.storage.atomic import partial_path
from reallm.targets.exported import Exported
from reallm.targets.packed_integers import PackedArtifact, PackedMatrix, read_packed

from .blocks import TYPE_IDS, from_blocks, to_blocks
from .file import GgufFile, Tensor, read_gguf, write_copy
from .types import gguf_type

MAX_ERROR = 0.6
"""Largest relative error at which base and artifact count as the same matrix; of other rows or models it is above 1."""


def write_gguf(artifact: Path, output: Path, base: Path, *, force: bool = False) -> Exported:
    """Write the artifact to the file `output` in the metadata of `base`, a GGUF file of the same model.

    Raises UserError for formats that GGUF does not hold, an output that exists, and a base of another model.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError("--target gguf needs the package gguf; install it: pip install 'reallm[gguf]'")
    if output.exists() and (not force or output.is_dir()):
        raise UserError(
            f"{output} exists; give another name" + ("" if output.is_dir() else ", or --force to replace it")
        )
    if output.exists() and output.samefile(base):
        raise UserError(f"--output {output} is the base file; give another name")
    packed = read_packed(artifact, read_tensors(artifact), gguf_type, "gguf")
    file = read_gguf(base)
    owners = _owners(packed, file)
    orders: dict[str, NDArray[np.int64]] = {}

    def blocks(name: str) -> NDArray[np.uint8]:
        tensor, matrix = file_tensors[name], packed.matrix(owners[name])
        orders[name] = _row_order(file, tensor, matrix)
        return to_blocks(matrix, orders[name])

    file_tensors = {tensor.name: tensor for tensor in file.tensors}
    types = {name: TYPE_IDS[packed.types[owner]] for name, owner in owners.items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(output)
    try:
        write_copy(file, partial, types, blocks)
        _verify(partial, file, packed, owners, orders)
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    return Exported(output, output.stat().st_size, packed.types)


def _owners(packed: PackedArtifact, file: GgufFile) -> dict[str, str]:
    """Tensor of the base -> the packed matrix that replaces it. Raises UserError if they do not fit."""
    import gguf

    arch = str(file.values.get("general.architecture"))
    ids = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if arch not in ids:
        raise UserError(f"{file.path}: the package gguf does not know its architecture {arch!r}; get a newer one")
    names: Any = gguf.get_tensor_name_map(ids[arch], int(file.values.get(f"{arch}.block_count", 0)))
    shapes = {choice.matrix: (choice.rows, choice.cols) for choice in packed.plan.choices}
    tensors, owners = {tensor.name: tensor for tensor in file.tensors}, {}
    for matrix in packed.types:
        if matrix in packed.tied:
            continue  # a head that uses the packed embedding is not stored
        name = names.get_name(f"{matrix}.weight", try_suffixes=(".weight",))
        if name not in tensors:
            raise UserError(f"{file.path} has no tensor for {matrix}; give a GGUF file of {packed.plan.model}")
        if tensors[name].shape[::-1] != shapes[matrix]:
            raise UserError(
                f"{file.path}: {name} is {list(tensors[name].shape[::-1])}, {matrix} of the artifact "
                f"{list(shapes[matrix])}; give a GGUF file of {packed.plan.model}"
            )
        owners[name] = matrix
    return owners


def _row_order(file: GgufFile, tensor: Tensor, matrix: PackedMatrix) -> NDArray[np.int64]:
    """The rows of `matrix` in the order of the base file. Raises UserError if no order fits."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    raw = file.bytes_of(tensor)
    kind, rows = GGMLQuantizationType(tensor.type), tensor.shape[1]
    floats = {GGMLQuantizationType.F32: "<f4", GGMLQuantizationType.F16: "<f2"}
    values = raw.view(floats[kind]).astype(np.float32) if kind in floats else dequantize(raw.reshape(rows, -1), kind)
    theirs, ours = np.asarray(values, dtype=np.float32).reshape(rows, -1), matrix.decoded()
    size = max(float(np.linalg.norm(theirs)), 1e-30)
    errors = [(float(np.linalg.norm(ours[order] - theirs)) / size, order) for order in _known_orders(file, rows)]
    error, order = min(errors, key=lambda pair: pair[0])
    if error > MAX_ERROR:
        raise UserError(
            f"{file.path}: {tensor.name} is not {matrix.name} of the artifact (relative difference {error:.2f}): give "
            "a GGUF file of the model that was compressed"
        )
    return order


def _known_orders(file: GgufFile, rows: int) -> Iterator[NDArray[np.int64]]:
    """The orders in which GGUF files store rows: as they are, and with the halves of each rotary head interleaved."""
    yield np.arange(rows)
    arch = file.values.get("general.architecture")
    for key in ("head_count", "head_count_kv"):
        heads = file.values.get(f"{arch}.attention.{key}")
        if isinstance(heads, int) and heads > 0 and rows % (2 * heads) == 0:
            yield np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def _verify(
    path: Path, base: GgufFile, packed: PackedArtifact, owners: dict[str, str], orders: dict[str, NDArray[np.int64]]
) -> None:
    """Read the written file back, and compare its values with the artifact's. Raises UserError."""
    written = read_gguf(path)
    assert (written.pairs, len(written.tensors)) == (base.pairs, len(base.tensors))
    for before, after in zip(base.tensors, written.tensors, strict=True):
        raw = written.bytes_of(after)
        if after.name in owners:
            matrix = packed.matrix(owners[after.name])
            expected = matrix.decoded()[orders[after.name]]
            same = np.array_equal(from_blocks(raw, after.type, len(expected)), expected)
        else:
            same = before.type == after.type and np.array_equal(raw, base.bytes_of(before))
        if not same or before.shape != after.shape:
            raise UserError(f"{path}: {after.name} was not written correctly; nothing was kept")
