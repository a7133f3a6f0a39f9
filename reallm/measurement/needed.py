"""Measuring only the candidates that the best plan within one budget needs.

The costs of the others are predicted (`predictions`). The planner solves with measured and predicted costs, what it
chose is encoded, which replaces predictions by measurements and improves the remaining ones, and it solves again, until
everything that it chooses is measured. The gap is then what a plan could gain if every unmeasured candidate were
`unmeasured.DEVIATIONS` standard deviations better than predicted. While it is larger than asked for, the candidates
that promise most are measured too.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Protocol

from reallm.errors import UserError
from reallm.kernels.formats.formats import Format
from reallm.models.matrix import Matrix
from reallm.planner.problem.candidates import matching_names, parse_pin, taking_part
from reallm.planner.problem.plan_options import PlanOptions
from reallm.planner.results.allocate import solve
from reallm.planner.results.unmeasured import DEVIATIONS, PREDICTED, unmeasured, with_predictions
from reallm.planner.tables.budget import Budget
from reallm.planner.tables.measured_table import MeasuredTable, MeasurementRecord, PredictionRecord, SharedRecord
from reallm.planner.tables.plan import Choice, Plan
from reallm.planner.tables.tensor_layout import shared_key
from reallm.planner.tables.units import MIB

from .first_candidates import Formats, first_candidates
from .predictions import predict
from .schedule import Measured

LOG = logging.getLogger(__name__)
DEFAULT_GAP = 0.02
MAX_ROUNDS = 40
"""More rounds than any table has needed; the gap that is left is stated in any case."""
STEP = 0.5
"""Share of the promised gain whose candidates are measured between two computations of the gap."""


class Encode(Protocol):
    """Encodes matrices in the given formats (by matrix name), or reads what the cache has of them."""

    def __call__(self, *, formats: Formats) -> Measured:
        """The measurements of all these candidates."""
        ...


@dataclass
class NeededMeasurement:
    """The measurements and predictions for the best plan within one budget."""

    table: MeasuredTable
    """A table without measurements."""
    matrices: Sequence[Matrix]
    """The matrices of the model; only those that take part in the plan are measured."""
    formats: Formats
    """The candidate formats of each matrix, by name."""
    encode: Encode
    budget: Budget
    options: PlanOptions
    gap: float
    """The gap at which measuring ends, as a share of the predicted loss."""
    records: dict[tuple[str, str], MeasurementRecord] = field(default_factory=dict)
    worker_peak_bytes: int = 0

    def __post_init__(self) -> None:
        participants = taking_part(self.table, self.budget.scope, self.options)
        names, pins = [m.name for m in self.matrices], map(parse_pin, self.options.pins)
        pinned = {name: [fmt] for regex, fmt in pins for name in matching_names(names, "--pin", regex)}
        self.matrices = [matrix for matrix in self.matrices if matrix.name in participants]
        self.formats = {m.name: pinned.get(m.name, self.formats[m.name]) for m in self.matrices}

    def run(self, known: Sequence[MeasurementRecord]) -> tuple[Measured, list[PredictionRecord]]:
        """Measure what is needed beyond the `known` records: (all records, predictions of what was not measured).

        Raises PlanError if no plan meets the budget and the options.
        """
        predictions = self._rounds(known)
        return Measured([*self.records.values()], self.worker_peak_bytes), predictions

    def _rounds(self, known: Sequence[MeasurementRecord]) -> list[PredictionRecord]:
        self.records = {(record.matrix, record.format): record for record in known}
        self._measure(self._first())
        for number in range(1, MAX_ROUNDS + 1):
            predictions = self._predictions()
            table = self.table.model_copy(
                update={"measurements": tuple(self.records.values()), "predictions": tuple(predictions)}
            )
            plan = solve(with_predictions(table), self.budget, self.options)
            wanted = [c for c in plan.choices if c.codes_sha256 == PREDICTED]
            if not wanted:
                hopeful = solve(with_predictions(table, DEVIATIONS), self.budget, self.options)
                remaining = unmeasured(plan, hopeful, len(predictions)).gap if predictions else 0.0
                LOG.info("round %d: everything chosen is measured, gap %.1f%%", number, 100 * remaining)
                if remaining <= self.gap or not (wanted := _most_promising(plan, hopeful)):
                    return predictions
            LOG.info("round %d: predicted loss %.4g, %d candidates to encode", number, plan.predicted_loss, len(wanted))
            self._measure(self._by_matrix([(c.matrix, c.format) for c in wanted]))
        return predictions

    def _first(self) -> Formats:
        """The first candidates of matrices of which nothing is known."""
        numel = sum(matrix.numel for matrix in self.matrices)
        nbytes = self.budget.nbytes(numel) - (self._other_bytes() if self.budget.scope == "file" else 0)
        bits = max(8 * nbytes / max(numel, 1), 1.0)
        return first_candidates(self.matrices, self.formats, bits)

    def _other_bytes(self) -> int:
        """About the bytes of the weights file that belong to no matrix that takes part."""
        inside = {matrix.name for matrix in self.matrices}
        size = {"f32": 4}.get(self.table.dtype, 2)
        return sum(m.source_bytes for m in self.table.matrices if m.name not in inside) + size * sum(
            prod(shape) for shape in self.table.other_tensors.values()
        )

    def _predictions(self) -> list[PredictionRecord]:
        """Predict everything that is not measured, after measuring what cannot be predicted."""
        while True:
            predictions = predict(self.matrices, self.formats, self.records.values())
            have = {*self.records, *((p.matrix, p.format) for p in predictions)}
            missing = [(n, f.name) for n, formats in self.formats.items() for f in formats if (n, f.name) not in have]
            if not missing:
                return predictions
            self._measure(self._by_matrix(missing))

    def _by_matrix(self, candidates: Sequence[tuple[str, str]]) -> Formats:
        result: dict[str, list[Format]] = {matrix.name: [] for matrix in self.matrices}
        for name, fmt in candidates:
            result[name].append(Format.parse(fmt))
        return result

    def _measure(self, formats: Formats) -> None:
        missing = {n: [f for f in fs if (n, f.name) not in self.records] for n, fs in formats.items()}
        if not any(missing.values()):
            return
        measured = self.encode(formats=missing)
        self.worker_peak_bytes = max(self.worker_peak_bytes, measured.worker_peak_bytes)
        new = {(record.matrix, record.format): record for record in measured.records}
        if absent := [name for name, fs in missing.items() for fmt in fs if (name, fmt.name) not in new]:
            raise UserError(f"{absent[0]} was not measured; run the command again, it resumes")
        self.records |= new


def _most_promising(plan: Plan, hopeful: Plan) -> list[Choice]:
    """The unmeasured choices of `hopeful` that make up STEP of what it gains over `plan`, at the price of its bytes."""
    price = plan.bound.shadow_price / MIB
    now = {choice.matrix: choice.cost + price * choice.nbytes for choice in plan.choices}
    unmeasured = [choice for choice in hopeful.choices if choice.codes_sha256 == PREDICTED]
    gains = {c.matrix: now[c.matrix] - c.cost - price * c.nbytes for c in unmeasured}
    unmeasured.sort(key=lambda choice: (-gains[choice.matrix], choice.matrix))
    total, result = STEP * sum(max(gain, 0.0) for gain in gains.values()), []
    for choice in unmeasured:
        result.append(choice)
        total -= max(gains[choice.matrix], 0.0)
        if total <= 0:
            break
    return result


def check_budget(table: MeasuredTable, formats: Formats, budget: Budget, options: PlanOptions) -> None:
    """Raise PlanError, before anything is measured, if no plan can meet `budget` and `options`.

    `table` has no measurements; `formats` are the candidates of its matrices.
    """
    names = [matrix.name for matrix in table.matrices]
    pins = [(n, fmt) for regex, fmt in map(parse_pin, options.pins) for n in matching_names(names, "--pin", regex)]
    candidates = {(m.name, fmt.name): (m, fmt) for m in table.matrices for fmt in formats[m.name]}
    candidates |= {(m.name, fmt.name): (m, fmt) for m in table.matrices for name, fmt in pins if name == m.name}
    records, shared = [], {}
    for matrix, fmt in candidates.values():
        nbytes = fmt.nbytes(matrix.rows, matrix.cols)
        cost = matrix.numel * 4.0 ** (-8 * nbytes / matrix.numel)
        costs = {"guided": cost, "two_sided": cost, "fisher": cost, "relative": cost}
        records.append(PredictionRecord(matrix=matrix.name, format=fmt.name, nbytes=nbytes, **costs, deviations={}))
        if (key := shared_key(fmt, matrix.family)) and fmt.shared_field:
            shared[key] = SharedRecord(key=key, nbytes=fmt.shared_field.nbytes, sha256="")
    table = table.model_copy(update={"predictions": tuple(records), "shared": tuple(shared.values())})
    solve(with_predictions(table), budget, options)
