"""Three measures of a model's size, which are easily confused: of its matrices, of all its weights, and of its files.

(a) Bits per weight of the matrices that a budget in bits per weight counts, with every byte stored for them: codes,
scales, codebooks, factors, padding. (b) Bits per weight of the whole model, including embeddings, head and norms.
(c) Bytes of the weights files, including headers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from reallm.kernels.storage.safetensors_reader import StoredTensor
from reallm.planner.tables.plan import PLAN_FILE, Plan
from reallm.planner.tables.records import read_record
from reallm.planner.tables.tensor_layout import SHARED_PREFIX

from .checkpoint import read_checkpoint
from .loaded import LoadedModel
from .source import locate

BYTE_DTYPE = "U8"
COUNTED_KINDS = ("linear", "expert")
"""Kinds of matrices that a budget in bits per weight counts."""


@dataclass(frozen=True)
class Sizes:
    """Exact numbers of bytes and of weights of one model."""

    matrices_bytes: int
    """Bytes stored for the matrices of COUNTED_KINDS, shared codebooks included."""
    matrices_weights: int
    """Number of weights in those matrices."""
    weights_bytes: int
    """Bytes of all tensors, headers excluded."""
    weights: int
    """Number of weights of the whole model; tied ones count once."""
    file_bytes: int
    """Bytes of the weights files, headers included."""

    @property
    def matrices_bpw(self) -> float:
        """(a) Bits per weight of the matrices."""
        return 8 * self.matrices_bytes / max(1, self.matrices_weights)

    @property
    def weights_bpw(self) -> float:
        """(b) Bits per weight of the whole model."""
        return 8 * self.weights_bytes / max(1, self.weights)


def artifact_sizes(folder: Path) -> Sizes:
    """Sizes of the artifact in `folder`, from its plan and the headers of its weights files."""
    plan = read_record(folder / PLAN_FILE, Plan, "compile")
    tensors = read_checkpoint(folder)
    chosen = {choice.matrix for choice in plan.choices}
    stacks = {choice.matrix.rpartition(".")[0] for choice in plan.choices if choice.kind == "expert"}
    counted = sum(choice.rows * choice.cols for choice in plan.choices)
    rest = sum(
        math.prod(t.shape) for name, t in tensors.items() if name not in stacks and not _belongs(name, t, chosen)
    )
    return Sizes(
        matrices_bytes=plan.matrices_bytes,
        matrices_weights=counted,
        weights_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        weights=counted + rest,
        file_bytes=_file_bytes(folder, None),
    )


def _belongs(name: str, tensor: StoredTensor, chosen: set[str]) -> bool:
    """Whether a stored tensor is part of a matrix that the plan chose a format for."""
    owner, _, last = name.rpartition(".")
    stored = tensor.dtype == BYTE_DTYPE or last == "weight"
    return stored and (owner in chosen or name.startswith(SHARED_PREFIX))


def model_sizes(loaded: LoadedModel) -> Sizes:
    """Sizes of an uncompressed model, with its tensors in the dtype that it was loaded in (bfloat16 for GGUF)."""
    counted = [matrix for matrix in loaded.matrices if matrix.kind in COUNTED_KINDS]
    tensors = {id(tensor): tensor for tensor in loaded.model.state_dict(keep_vars=True).values()}.values()
    located = locate(loaded.source)
    return Sizes(
        matrices_bytes=sum(matrix.source_bytes for matrix in counted),
        matrices_weights=sum(matrix.rows * matrix.cols for matrix in counted),
        weights_bytes=sum(tensor.nbytes for tensor in tensors),
        weights=sum(tensor.numel() for tensor in tensors),
        file_bytes=_file_bytes(located.folder, located.gguf_file),
    )


def _file_bytes(folder: Path, gguf_file: str | None) -> int:
    files = [folder / gguf_file] if gguf_file else folder.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)
