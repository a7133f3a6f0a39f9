"""The plan: which format every matrix gets, and the solver's proof of that choice."""

from __future__ import annotations

from collections.abc import Mapping
from math import isclose
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from reallm.kernels.formats.formats import Format

from .measured_table import Kind
from .records import Record, read_record
from .requirements import Requirements, Reserved
from .tensor_layout import stored_nbytes

PLAN_FILE = "plan.json"
"""Name of the plan inside an artifact."""
Scope = Literal["matrices", "file"]
"""What a budget counts: the matrices that take part, or the whole weights file."""
Cost = Literal["two_sided", "guided", "fisher", "relative"]
"""Which measured error is minimised; see `MeasurementRecord`."""
Ties = Literal["none", "inputs", "experts", "family"]
"""Which matrices must share a format; see `PlanOptions.ties`."""


def _is_empty(value: Mapping[str, object]) -> bool:
    """A field that few plans need is left out of the file where it is empty."""
    return not value


def _is_none(value: object) -> bool:
    return value is None


class Choice(Record):
    """The format chosen for one matrix."""

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
    """Digest of the packed fields; empty for a matrix that stays in the model's own dtype, which is not measured."""
    runner_up: str | None = None
    """The format with the lowest cost + shadow price * bytes except the chosen one; None where there is no other."""

    @model_validator(mode="after")
    def _check_nbytes(self) -> Self:
        expected = stored_nbytes(Format.parse(self.format), self.rows, self.cols, self.kind)
        if self.nbytes not in expected:
            raise ValueError(f"{self.matrix} in {self.format} takes {expected[0]} bytes, not {self.nbytes}")
        return self


class Bound(Record):
    """What the solver proved about a plan, checked again without the solver."""

    solver: str
    solver_version: str
    status: Literal["optimal", "feasible"]
    """"optimal": mip_gap is at most OPTIMAL_GAP and the Lagrangian bound does not contradict it."""
    objective: float
    best_bound: float
    mip_gap: float = Field(ge=0)
    lagrangian_bound: float
    """A lower bound of the objective that is computed without the solver, in exact arithmetic."""
    shadow_price: float
    """Loss that one more MiB would save around this budget, in nats per token per MiB."""


class LimitState(Record):
    """How much of one limit (a memory pool or the latency) a plan uses."""

    name: str
    unit: Literal["bytes", "ns"]
    capacity: int
    """What the matrices that take part may use: the limit less what the rest of the model uses."""
    used: int
    shadow_price: float
    """Loss that one more MiB or millisecond would save, in nats per token."""

    @model_validator(mode="after")
    def _check_used(self) -> Self:
        if not 0 <= self.used <= self.capacity:
            raise ValueError(f"{self.name}: {self.used} {self.unit} are used, the capacity is {self.capacity}")
        return self


class Uniform(Record):
    """The best plan with a single format within the same budget, for comparison."""

    format: str
    nbytes: int
    """Bytes of this plan, as the budget counts them."""
    cost: float


class Measured(Record):
    """The losses of several plans, measured on held-out text; the plan that holds this record was the best."""

    text: str
    text_sha256: str
    windows: int = Field(gt=0)
    seqlen: int = Field(gt=0)
    kl: float
    """KL divergence of this plan from the uncompressed model, in nats per token."""
    uniform_kl: float | None
    """The same for the best single format within the budget; None where none fits."""
    tried: tuple[tuple[str, float, float], ...]
    """(name, predicted loss without corrections, measured KL) of every plan, in the order of measuring."""


class Unmeasured(Record):
    """The candidates whose costs were predicted and not measured, and what they could gain. No plan chooses them."""

    candidates: int = Field(gt=0)
    least_loss: float
    """Predicted loss of the best plan, if each of them were `deviations` standard deviations better than predicted."""
    deviations: float
    gap: float
    """How far `least_loss` lies below the loss of this plan, as a share of it."""


class Plan(Record):
    """The solution of the allocation problem for one budget.

    >>> plan = reallm.plan("work", budget="5bpw")
    >>> len(plan.choices), plan.counted_bytes <= plan.budget_bytes
    (14, True)
    """

    version: Literal[1] = 1
    model: str
    model_sha256: str
    work: str
    """The folder with the measured table that the plan was made from."""
    table_sha256: str
    """Digest of that table without its timings."""
    calibration: str | None = Field(default=None, exclude_if=_is_none)
    """What the table was calibrated on: windows, text and seed; None if the table does not say."""
    budget: str
    """The budget as the user wrote it."""
    budget_bytes: int = Field(gt=0)
    scope: Scope
    """What the budget counts: the matrices that take part (for bpw), or the whole weights file (for MiB, GiB)."""
    counted_bytes: int
    """Exact bytes of everything that the budget counts."""
    matrices_bytes: int
    """Exact bytes of the choices and their shared codebooks, without headers."""
    file_bytes: int
    """Exact bytes of all weights files, headers included."""
    bits_per_weight: float
    """8 * matrices_bytes / number of weights in the choices."""
    predicted_loss: float
    """Sum of the costs of all choices, in nats per token."""
    bound: Bound
    choices: tuple[Choice, ...]
    """One choice per matrix that took part, in natural order of names. In a dense format, the model's tensor stays."""
    shared: Mapping[str, int] = {}
    """Key -> bytes of each shared codebook in use."""
    dense: tuple[str, ...] = ()
    """Matrices that took no part and stay as they are."""
    kept: Mapping[str, tuple[str, ...]] = Field({}, exclude_if=_is_empty)
    """Reason -> those of `dense` that calibration could not measure."""
    unmeasured: Unmeasured | None = Field(default=None, exclude_if=_is_none)
    """What candidates that were not measured could gain; None if all were. Every cost in the plan was measured."""
    uniform: Uniform | None = None
    """The best single format within the budget; None where none fits."""
    pins: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    formats: tuple[str, ...] | None = None
    ties: Ties = "none"
    cost: Cost = "two_sided"
    """`pins` to `cost`: the options that the plan was made with, as `PlanOptions` defines them."""
    requirements: Requirements = Requirements()
    """The limits that the plan had to meet besides its budget."""
    reserved: Reserved = Reserved()
    """Memory within the budget that is set aside and cannot hold weights."""
    limits: tuple[LimitState, ...] = ()
    corrections: Mapping[str, float] = {}
    """Family -> factor that its measured costs were multiplied by (`plan --refit`)."""
    measured: Measured | None = None
    notes: tuple[str, ...] = ()
    """Remarks for the reader, one sentence each."""

    @model_validator(mode="after")
    def _check_sums(self) -> Self:
        nbytes = sum(choice.nbytes for choice in self.choices) + sum(self.shared.values())
        names = [choice.matrix for choice in self.choices] + list(self.dense)
        if len(set(names)) != len(names):
            raise ValueError("a matrix is listed twice")
        if self.matrices_bytes != nbytes or not 0 < self.counted_bytes <= self.budget_bytes - self.reserved.nbytes:
            raise ValueError(
                f"the bytes do not add up: {nbytes} in the choices, {self.matrices_bytes} in matrices_bytes"
            )
        if not isclose(self.predicted_loss, sum(choice.cost for choice in self.choices), rel_tol=1e-9, abs_tol=1e-300):
            raise ValueError("the costs do not add up to predicted_loss")
        return self


def read_plan(path: str | Path) -> Plan:
    """The plan in `path`: a plan.json, or the folder of an artifact, which holds one.

    Raises RecordError when it is missing or invalid; the message names the command that writes it.
    """
    path = Path(path)
    return read_record(path / PLAN_FILE, Plan, "compile") if path.is_dir() else read_record(path, Plan, "plan")
