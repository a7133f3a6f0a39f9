"""The rounds of `measure --budget` with every encoding looked up in a table that holds all of them.

Encoding is deterministic, so that the records are those of a real run; NAME=compress makes some real runs and compares.
Seconds are those of the table. A matrix that is encoded in several rounds is factorised in each of them: SETUP of its
shape is added for every round but the one in which the table has it.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import log

import numpy as np

from reallm.codecs.encode import encode
from reallm.codecs.metric import Workspace
from reallm.kernels.formats.codecs import TrellisCodec
from reallm.kernels.formats.formats import Format
from reallm.measurement.encoding import Job
from reallm.measurement.needed import NeededMeasurement
from reallm.measurement.schedule import Measured
from reallm.models.loaded import LoadedModel, Matrix
from reallm.planner.problem.plan_options import PlanOptions
from reallm.planner.results.allocate import solve
from reallm.planner.tables.budget import parse_budget
from reallm.planner.tables.measured_table import MeasuredTable, MeasurementRecord, PredictionRecord
from reallm.planner.tables.plan import Choice, Plan
from reallm.system.threads import one_thread

Formats = Mapping[str, Sequence[Format]]
Key = tuple[str, str]
BLOCKS = (4, 14, 24)
"""The blocks in which setups are timed."""


def setup_seconds(loaded: LoadedModel, job: Job, fmt: Format) -> dict[tuple[int, int], float]:
    """Shape -> thread seconds that the first encoding of a matrix takes beyond the next one, in the trellis `fmt`."""
    found: dict[tuple[int, int], list[float]] = defaultdict(list)
    with one_thread():
        for matrix in loaded.matrices:
            if matrix.block in BLOCKS and matrix.kind == "linear":
                work, weight = Workspace(job.metric(matrix)), loaded.weight(matrix)
                began = time.thread_time()
                encode(weight, fmt, work)
                between = time.thread_time()
                encode(weight, fmt, work)
                found[matrix.rows, matrix.cols].append(2 * between - began - time.thread_time())
    return {shape: float(np.median(seconds)) for shape, seconds in found.items()}


@dataclass
class Lookup:
    """Stands in for the encoders: returns the records of `full`, and counts the seconds that they took."""

    full: MeasuredTable
    setup: Mapping[tuple[int, int], float]
    records: dict[Key, MeasurementRecord] = field(init=False)
    seconds: float = 0.0
    """Thread seconds of everything looked up."""
    rounds: list[int] = field(default_factory=list)
    """Candidates encoded in each round."""

    def __post_init__(self) -> None:
        self.records = {(r.matrix, r.format): r for r in self.full.measurements}
        self._shapes = {m.name: (m.rows, m.cols) for m in self.full.matrices}
        first: dict[str, str] = {}
        for name, formats in self.formats().items():
            first[name] = next((fmt.name for fmt in formats if _uses_setup(fmt)), "")
        self._first = first

    def formats(self) -> dict[str, list[Format]]:
        """The candidates of every matrix, in the order in which they were encoded."""
        result: dict[str, list[Format]] = {matrix.name: [] for matrix in self.full.matrices}
        for name, fmt in self.records:
            result[name].append(Format.parse(fmt))
        return result

    def task_seconds(self, name: str, formats: Sequence[Format]) -> float:
        """Thread seconds of encoding one matrix in `formats`, beginning with its factorisation."""
        setup = self.setup.get(self._shapes[name], 0.0)
        alone = sum(self.records[name, f.name].seconds - (f.name == self._first[name]) * setup for f in formats)
        return alone + setup * any(_uses_setup(f) for f in formats)

    def __call__(self, *, formats: Formats) -> Measured:
        self.seconds += sum(self.task_seconds(name, fmts) for name, fmts in formats.items())
        self.rounds.append(sum(len(fmts) for fmts in formats.values()))
        return Measured([self.records[name, f.name] for name, fmts in formats.items() for f in fmts], 0)


def _uses_setup(fmt: Format) -> bool:
    return isinstance(fmt.codec, TrellisCodec)


@dataclass(frozen=True)
class Rounds:
    """One budget: what was encoded, and the plan beside the optimum of the full table."""

    bits: float
    encoded: int
    candidates: int
    rounds: list[int]
    """Candidates encoded in each round."""
    encoding_seconds: float
    once_seconds: float
    """Thread seconds of encoding the chosen candidates alone."""
    solver_seconds: float
    """Processor seconds of all solutions and predictions."""
    gap: float
    """The gap that the plan states."""
    plan: Plan
    optimum: Plan
    accuracy: dict[str, tuple[int, float, float, float]]
    """Format -> (predictions, mean and deviation of the logarithm of predicted / true cost, mean stated deviation)."""
    measured: frozenset[Key]

    @property
    def time_ratio(self) -> float:
        """Seconds of all encoding, in units of encoding the model once at this rate."""
        return self.encoding_seconds / self.once_seconds

    @property
    def loss_ratio(self) -> float:
        """Measured objective of the plan, in units of the optimum's."""
        return self.plan.predicted_loss / self.optimum.predicted_loss


def look_up(
    full: MeasuredTable, matrices: Sequence[Matrix], setup: Mapping[tuple[int, int], float], bits: float, gap: float
) -> Rounds:
    """Run the rounds for `bits` per weight until the gap is at most `gap`. Plans name no work folder."""
    lookup, options, budget = Lookup(full, setup), PlanOptions(), f"{bits:g}bpw"
    table = full.model_copy(update={"measurements": (), "predictions": ()})
    needed = NeededMeasurement(table, matrices, lookup.formats(), lookup, parse_budget(budget), options, gap)
    began = time.process_time()
    with _quiet():
        measured, predictions = needed.run([])
    spent = time.process_time() - began
    found = {"measurements": tuple(measured.records), "predictions": tuple(predictions)}
    plan, optimum = solve(table.model_copy(update=found), budget, options), solve(full, budget, options)
    inside = {matrix.name for matrix in needed.matrices}
    return Rounds(
        bits=bits,
        encoded=len(measured.records),
        candidates=sum(name in inside for name, _ in lookup.records),
        rounds=lookup.rounds,
        encoding_seconds=lookup.seconds,
        once_seconds=sum(lookup.task_seconds(c.matrix, [Format.parse(c.format)]) for c in _encoded(plan, lookup)),
        solver_seconds=spent,
        gap=0.0 if plan.unmeasured is None else plan.unmeasured.gap,
        plan=plan,
        optimum=optimum,
        accuracy=dict(_accuracy(predictions, lookup.records)),
        measured=frozenset((r.matrix, r.format) for r in measured.records),
    )


def _encoded(plan: Plan, lookup: Lookup) -> Iterator[Choice]:
    return (choice for choice in plan.choices if (choice.matrix, choice.format) in lookup.records)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines on every round."""
    logger = logging.getLogger("reallm.measurement.needed")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _accuracy(
    predictions: Sequence[PredictionRecord], records: Mapping[Key, MeasurementRecord]
) -> Iterator[tuple[str, tuple[int, float, float, float]]]:
    """What `Rounds.accuracy` holds, for the two-sided cost."""
    by_format: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for p in predictions:
        error = log(p.two_sided / records[p.matrix, p.format].two_sided)
        by_format[p.format].append((error, p.deviations["two_sided"]))
    for fmt, pairs in sorted(by_format.items()):
        errors, stated = np.array(pairs).T
        yield fmt, (len(pairs), float(errors.mean()), float(errors.std()), float(stated.mean()))
