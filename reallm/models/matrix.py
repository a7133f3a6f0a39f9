"""The description of one weight matrix of a model.

It is in a separate module because workers that encode a matrix need it without transformers, which takes seconds to
import.
"""

from __future__ import annotations

from dataclasses import dataclass

from reallm.planner.tables.measured_table import Kind, MatrixRecord


@dataclass(frozen=True)
class Matrix:
    """One weight matrix of a loaded model and its place in the model."""

    name: str
    """Module path; for an expert, path of the parameter and index: `model.layers.0.mlp.experts.down_proj.3`."""
    parameter: str
    """Name in the model's state dict; it is the same for all experts of a stack."""
    rows: int
    """Output features."""
    cols: int
    """Input features."""
    kind: Kind
    transposed: bool
    """Whether it is stored [in, out] (Conv1D, some expert stacks)."""
    block: int | None
    """Index of the block that contains the matrix; None if no block contains it."""
    input: str
    """Name of the matrix's input: the name of the first matrix with the same input. For an embedding: the name of its
    tied head, or empty."""
    family: str
    """The role of the matrix in every block: its name without block and expert numbers, e.g. `self_attn.q_proj`."""
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
