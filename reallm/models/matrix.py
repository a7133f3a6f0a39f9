"""The description of one weight matrix of a model.

A module of its own, because workers that encode a matrix need this description but not transformers, which takes
seconds to import.
"""

from __future__ import annotations

from dataclasses import dataclass

from reallm.planner.tables.measured_table import Kind, MatrixRecord


@dataclass(frozen=True)
class Matrix:
    """One weight matrix of a loaded model and its place in the model."""

    name: str
    """Module path; for an expert the parameter's path and the index: `model.layers.0.mlp.experts.down_proj.3`."""
    parameter: str
    """Name in the model's state dict; all experts of a stack share it."""
    rows: int
    """Output features."""
    cols: int
    """Input features."""
    kind: Kind
    transposed: bool
    """Whether it is stored [in, out] (Conv1D, some expert stacks)."""
    block: int | None
    """Index into the model's blocks; None outside them."""
    input: str
    """Name of the input: that of the first matrix that reads it. For an embedding: its tied head, or empty."""
    family: str
    """Its role across blocks: the name without block and expert numbers, e.g. `self_attn.q_proj`."""
    expert: int | None
    """Index into the stack of experts; None for other matrices."""
    tied: tuple[str, ...]
    """Other parameter names of the same tensor."""
    source_bytes: int
    """Bytes of the uncompressed matrix."""

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.rows * self.cols

    def record(self) -> MatrixRecord:
        """The record that `measure` writes into its table."""
        return MatrixRecord(
            name=self.name,
            rows=self.rows,
            cols=self.cols,
            kind=self.kind,
            block=self.block,
            input=self.input,
            family=self.family,
            source_bytes=self.source_bytes,
        )
