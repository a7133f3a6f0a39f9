"""Describe what an artifact contains, matrix by matrix, without reading a weight."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from reallm.kernels.storage.safetensors_reader import StoredTensor
from reallm.planner.tables.plan import Plan, read_plan

from .bundled_adapters import AdapterView, linear_shapes, view_adapters
from .directory import read_config, read_record_of
from .verify import read_tensors


@dataclass(frozen=True)
class MatrixView:
    """One matrix of an artifact."""

    name: str
    kind: str
    rows: int
    cols: int
    format: str
    nbytes: int
    cost: float
    """Predicted increase of the loss through its format, in nats per token."""
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
    plan: Plan
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
        The folder that `reallm compile` or `reallm finetune` wrote.

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
    folder = Path(path)
    plan, tensors = read_plan(folder), read_tensors(folder)
    packed = {matrix for matrix, _ in read_record_of(folder).matrices()}
    architectures = read_config(folder).get("architectures") or ["unknown"]
    matrices = tuple(
        MatrixView(c.matrix, c.kind, c.rows, c.cols, c.format, c.nbytes, c.cost, c.matrix in packed)
        for c in plan.choices
    )
    file_bytes = sum(file.stat().st_size for file in {tensor.path for tensor in tensors.values()})
    data_bytes = sum(tensor.stop - tensor.start for tensor in tensors.values())
    return Inspection(
        path=str(folder),
        architecture=str(architectures[0]),
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


def _covered(tensors: Mapping[str, StoredTensor], plan: Plan) -> int:
    """The number of tensors that belong to a choice of the plan or are shared codebooks."""
    owners = {choice.matrix for choice in plan.choices}
    owners |= {name.rpartition(".")[0] for name in owners if name not in tensors and name.rpartition(".")[0] in tensors}
    return sum(
        name in owners or name.rpartition(".")[0] in owners or name.startswith("reallm_shared.") for name in tensors
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
