"""The plan: which format every matrix gets, and the proof that came with the choice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from .records import Kind, Record


class Choice(Record):
    """One matrix's share of the plan."""

    matrix: str
    format: str
    rows: int = Field(gt=0)
    cols: int = Field(gt=0)
    kind: Kind
    family: str
    nbytes: int = Field(gt=0)
    cost: float = Field(ge=0)
    """Predicted loss of this choice, nats per token."""
    codes_sha256: str
    runner_up: str | None = None
    """The format that the next-best value of cost + price * bytes would pick."""


class Bound(Record):
    """The solver's word, checked again without the solver."""

    solver: str
    solver_version: str
    status: Literal["optimal", "feasible"]
    objective: float
    best_bound: float
    mip_gap: float = Field(ge=0)
    lagrangian_bound: float
    """A lower bound computed without the solver; objective can never be under it."""
    shadow_price: float
    """Loss saved per further MiB around this budget, nats per token per MiB."""


class Uniform(Record):
    """The best single format for everything that fits the same budget, for comparison."""

    format: str
    nbytes: int
    cost: float


class Plan(Record):
    """The solution of the allocation problem for one budget."""

    version: Literal[1] = 1
    model: str
    model_sha256: str
    work: str
    """The measure directory it was planned from."""
    table_sha256: str
    budget: str
    """As the user wrote it."""
    budget_bytes: int = Field(gt=0)
    scope: Literal["matrices", "file"]
    """What the budget counts: the bytes of the compressed matrices (bpw), or the whole weights file (MiB, GiB)."""
    counted_bytes: int
    """Bytes of what the budget counts, exact."""
    matrices_bytes: int
    """Bytes of the compressed matrices and their shared codebooks, exact."""
    file_bytes: int
    """Bytes of the whole weights file(s), headers included, exact."""
    bits_per_weight: float
    """8 * matrices_bytes over the weights of the compressed matrices."""
    predicted_loss: float
    """Sum of the costs, nats per token."""
    bound: Bound
    choices: tuple[Choice, ...]
    shared: Mapping[str, int] = {}
    """Key -> bytes of every shared codebook in use."""
    dense: tuple[str, ...] = ()
    """Matrices left as they are."""
    uniform: Uniform | None = None
    notes: tuple[str, ...] = ()
