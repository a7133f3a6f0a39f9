"""The plan: which format every matrix gets, and the proof that came with the choice."""

from __future__ import annotations

from collections.abc import Mapping
from math import isclose
from typing import Literal, Self

from pydantic import Field, model_validator

from reallm.kernels.formats.formats import Format
from reallm.planner.problem.tensor_layout import stored_nbytes

from .measured_table import Kind
from .records import Record
from .requirements import Requirements, Reserved

PLAN_FILE = "plan.json"
Scope = Literal["matrices", "file"]
Cost = Literal["two_sided", "guided", "fisher", "relative"]
Ties = Literal["none", "inputs", "experts", "family"]


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
    """Digest of the packed fields; empty where the matrix stays in the model's own dtype (it was not measured)."""
    runner_up: str | None = None
    """The format that the next-best value of cost + price * bytes would pick."""

    @model_validator(mode="after")
    def _check_nbytes(self) -> Self:
        expected = stored_nbytes(Format.parse(self.format), self.rows, self.cols, self.kind)
        if self.nbytes not in expected:
            raise ValueError(f"{self.matrix} in {self.format} takes {expected[0]} bytes, not {self.nbytes}")
        return self


class Bound(Record):
    """The solver's word, checked again without the solver."""

    solver: str
    solver_version: str
    status: Literal["optimal", "feasible"]
    """"optimal": mip_gap is at most OPTIMAL_GAP and the Lagrangian bound does not contradict it."""
    objective: float
    best_bound: float
    mip_gap: float = Field(ge=0)
    lagrangian_bound: float
    """A lower bound computed without the solver; objective can never be under it."""
    shadow_price: float
    """Loss saved per further MiB around this budget, nats per token per MiB."""


class LimitState(Record):
    """How far a plan uses one of the further limits it was asked to keep."""

    name: str
    unit: Literal["bytes", "ns"]
    capacity: int
    """What the matrices that take part may use; the rest of the model's share is taken off."""
    used: int
    shadow_price: float
    """Loss saved per further MiB or millisecond, nats per token."""

    @model_validator(mode="after")
    def _check_used(self) -> Self:
        if not 0 <= self.used <= self.capacity:
            raise ValueError(f"{self.name}: {self.used} of {self.capacity} {self.unit} are used")
        return self


class Uniform(Record):
    """The best single format for everything that fits the same budget, for comparison."""

    format: str
    nbytes: int
    """Bytes of what the budget counts."""
    cost: float


class Measured(Record):
    """Plans measured in memory on held-out text, this one the best of them."""

    text: str
    text_sha256: str
    windows: int = Field(gt=0)
    seqlen: int = Field(gt=0)
    kl: float
    """KL to the dense model, nats per token, of this plan."""
    uniform_kl: float | None
    """Of the best single format within the budget."""
    tried: tuple[tuple[str, float, float], ...]
    """(name, predicted loss without corrections, measured KL) of every plan measured, in turn."""


class Plan(Record):
    """The solution of the allocation problem for one budget."""

    version: Literal[1] = 1
    model: str
    model_sha256: str
    work: str
    """The measure directory it was planned from."""
    table_sha256: str
    """Digest of the measured table without its timings."""
    budget: str
    """As the user wrote it."""
    budget_bytes: int = Field(gt=0)
    scope: Scope
    """What the budget counts: the bytes of the matrices that take part (bpw), or the whole weights file (MiB, GiB)."""
    counted_bytes: int
    """Bytes of what the budget counts, exact."""
    matrices_bytes: int
    """Bytes of the choices and their shared codebooks, headers left out, exact."""
    file_bytes: int
    """Bytes of the whole weights file(s), headers included, exact."""
    bits_per_weight: float
    """8 * matrices_bytes over the weights of the choices."""
    predicted_loss: float
    """Sum of the costs, nats per token."""
    bound: Bound
    choices: tuple[Choice, ...]
    """Every matrix that took part, in natural order of names; one in a dense format stays the model's own tensor."""
    shared: Mapping[str, int] = {}
    """Key -> bytes of every shared codebook in use."""
    dense: tuple[str, ...] = ()
    """Matrices that took no part and are left as they are."""
    uniform: Uniform | None = None
    pins: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    formats: tuple[str, ...] | None = None
    ties: Ties = "none"
    cost: Cost = "two_sided"
    """What was asked beside the budget, as `candidates.PlanOptions`."""
    requirements: Requirements = Requirements()
    """What it was to keep beside the budget."""
    reserved: Reserved = Reserved()
    """What the budget pays for beside the weights."""
    limits: tuple[LimitState, ...] = ()
    corrections: Mapping[str, float] = {}
    """Family -> factor that its measured costs were multiplied by (`plan --refit`)."""
    measured: Measured | None = None
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check_sums(self) -> Self:
        nbytes = sum(choice.nbytes for choice in self.choices) + sum(self.shared.values())
        names = [choice.matrix for choice in self.choices] + list(self.dense)
        if len(set(names)) != len(names):
            raise ValueError("a matrix stands in it twice")
        if self.matrices_bytes != nbytes or not 0 < self.counted_bytes <= self.budget_bytes - self.reserved.nbytes:
            raise ValueError(f"its bytes do not add up: {nbytes} chosen, {self.matrices_bytes} planned")
        if not isclose(self.predicted_loss, sum(choice.cost for choice in self.choices), rel_tol=1e-9, abs_tol=1e-300):
            raise ValueError("its costs do not add up to the predicted loss")
        return self
