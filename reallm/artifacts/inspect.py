"""Describe what an artifact contains, matrix by matrix, without reading a weight."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from reallm.kernels.formats.formats import Format
from reallm.kernels.storage.safetensors_reader import StoredTensor
from reallm.planner.tables.plan import Plan, read_plan
from reallm.planner.tables.tensor_layout import SHARED_PREFIX

from .bundled_adapters import AdapterView, linear_shapes, view_adapters
from .directory import read_config, read_record_of
from .find import is_saved_copy, require_artifact
from .saved_copy import copied_matrices
from .stored_values import read_tensors


@dataclass(frozen=True)
class MatrixView:
    """One matrix of an artifact."""

    name: str
    kind: str
    """"linear", "embedding", "head" or "expert"; empty if there is no plan."""
    rows: int
    cols: int
    format: str
    nbytes: int
    cost: float | None
    """Predicted increase of the loss through its format, in nats per token; None if there is no plan."""
    packed: bool
    """Whether it is stored in packed fields; otherwise it is a plain tensor of the model."""

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight; scales and all other fields are included."""
        return 8 * self.nbytes / (self.rows * self.cols)


@dataclass(frozen=True)
class FormatView:
    """All matrices in one format."""

    matrices: int
    weights: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight."""
        return 8 * self.nbytes / self.weights


@dataclass(frozen=True)
class Inspection:
    """What an artifact contains: its plan, formats, sizes and adapters.

    >>> reallm.inspect("out").architecture
    'LlamaForCausalLM'
    """

    path: str
    architecture: str
    plan: Plan | None
    """None for a folder to which transformers saved an artifact."""
    matrices: tuple[MatrixView, ...]
    formats: Mapping[str, FormatView]
    bits_histogram: Mapping[int, int]
    """b -> number of weights stored in more than b - 1 and at most b bits each."""
    shared_bytes: int
    """Size of the codebooks that matrices share."""
    other_tensors: int
    other_bytes: int
    """Size of the tensors that the plan does not choose formats for: norms, biases, matrices left as they are."""
    header_bytes: int
    file_bytes: int
    """Size of the weights files: matrices + shared + other + headers."""
    adapters: tuple[AdapterView, ...] = ()
    """The adapters inside the artifact; the figures above do not include them."""


def inspect(path: Path | str) -> Inspection:
    """Describe an artifact from its plan, its config.json and the headers of its weights files.

    Parameters
    ----------
    path
        The folder that `reallm compile` or `reallm finetune` wrote, its name on the Hugging Face hub, or a folder to
        which transformers saved it.

    Returns
    -------
    Inspection
        The plan, the formats and sizes (in bytes) per matrix and in total, and the adapters inside the artifact.

    Raises
    ------
    UserError, RecordError
        If one of these files is missing or damaged. Both are subclasses of ReallmError. Weights are not read; use
        `verify` to check them.

    Examples
    --------
    >>> reallm.inspect("out").plan.bits_per_weight <= 5
    True
    """
    folder = require_artifact(path)
    tensors = read_tensors(folder)
    if is_saved_copy(folder):
        return _inspect_copy(folder, tensors)
    plan = read_plan(folder)
    packed = {matrix for matrix, _ in read_record_of(folder).matrices()}
    matrices = tuple(
        MatrixView(c.matrix, c.kind, c.rows, c.cols, c.format, c.nbytes, c.cost, c.matrix in packed)
        for c in plan.choices
    )
    file_bytes, data_bytes = _file_bytes(tensors), sum(tensor.nbytes for tensor in tensors.values())
    return Inspection(
        path=str(folder),
        architecture=_architecture(folder),
        plan=plan,
        matrices=matrices,
        formats=_by_format(matrices),
        bits_histogram=_histogram(matrices),
        shared_bytes=sum(plan.shared.values()),
        other_tensors=len(tensors) - _covered(tensors, plan),
        other_bytes=data_bytes - plan.matrices_bytes,
        header_bytes=file_bytes - data_bytes,
        file_bytes=file_bytes,
        adapters=view_adapters(folder, linear_shapes(plan, tensors)),
    )


def _inspect_copy(folder: Path, tensors: Mapping[str, StoredTensor]) -> Inspection:
    """Describe a folder to which transformers saved an artifact: it has no plan, but its config.json names formats."""
    matrices = tuple(
        MatrixView(m.name, "", m.rows, m.cols, m.format.name, m.nbytes, None, True)
        for m in copied_matrices(folder, tensors)
    )
    file_bytes, data_bytes = _file_bytes(tensors), sum(tensor.nbytes for tensor in tensors.values())
    shared = {name: tensor.nbytes for name, tensor in tensors.items() if name.startswith(SHARED_PREFIX)}
    packed_bytes = sum(matrix.nbytes for matrix in matrices) + sum(shared.values())
    fields = sum(len(Format.parse(m.format).fields(m.rows, m.cols)) for m in matrices)
    return Inspection(
        path=str(folder),
        architecture=_architecture(folder),
        plan=None,
        matrices=matrices,
        formats=_by_format(matrices),
        bits_histogram=_histogram(matrices),
        shared_bytes=sum(shared.values()),
        other_tensors=len(tensors) - len(shared) - fields,
        other_bytes=data_bytes - packed_bytes,
        header_bytes=file_bytes - data_bytes,
        file_bytes=file_bytes,
    )


def _architecture(folder: Path) -> str:
    architectures = read_config(folder).get("architectures")
    return str(architectures[0]) if isinstance(architectures, list) and architectures else "unknown"


def _file_bytes(tensors: Mapping[str, StoredTensor]) -> int:
    return sum(file.stat().st_size for file in {tensor.path for tensor in tensors.values()})


def _covered(tensors: Mapping[str, StoredTensor], plan: Plan) -> int:
    """The number of tensors that belong to a choice of the plan or are shared codebooks."""
    owners = {choice.matrix for choice in plan.choices}
    owners |= {name.rpartition(".")[0] for name in owners if name not in tensors and name.rpartition(".")[0] in tensors}
    return sum(
        name in owners or name.rpartition(".")[0] in owners or name.startswith(SHARED_PREFIX) for name in tensors
    )


def _by_format(matrices: tuple[MatrixView, ...]) -> dict[str, FormatView]:
    groups: dict[str, list[MatrixView]] = defaultdict(list)
    for matrix in matrices:
        groups[matrix.format].append(matrix)
    return {
        name: FormatView(len(group), sum(m.rows * m.cols for m in group), sum(m.nbytes for m in group))
        for name, group in sorted(groups.items())
    }


def _histogram(matrices: tuple[MatrixView, ...]) -> dict[int, int]:
    weights: dict[int, int] = defaultdict(int)
    for matrix in matrices:
        weights[-(-8 * matrix.nbytes // (matrix.rows * matrix.cols))] += matrix.rows * matrix.cols
    return dict(sorted(weights.items()))
