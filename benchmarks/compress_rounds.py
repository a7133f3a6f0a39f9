"""The rounds of `measure --budget` from an empty folder, with encodings that several budgets share.

Encoding is deterministic, so that a record is the same whichever budget asked for it first; the whole jobs of
NAME=compress encode everything again, and compare. A matrix that is encoded in several rounds is factorised in each of
them: its seconds are counted with one factorisation per round, whenever its formats were really encoded.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path

import numpy as np

from reallm.kernels.formats.codecs import TrellisCodec
from reallm.kernels.formats.formats import Format
from reallm.kernels.storage.atomic import canonical_json, write_text_atomic
from reallm.measurement.encoding import Job
from reallm.measurement.first_candidates import Formats
from reallm.measurement.needed import NeededMeasurement
from reallm.measurement.schedule import Measured, measure_formats, split_by_cache
from reallm.measurement.workers.task import Workers
from reallm.models.loaded import LoadedModel
from reallm.planner.problem.plan_options import PlanOptions
from reallm.planner.results.allocate import solve
from reallm.planner.tables.budget import parse_budget
from reallm.planner.tables.measured_table import Kind, MeasuredTable, MeasurementRecord, PredictionRecord
from reallm.planner.tables.plan import Plan
from reallm.planner.tables.work_folder import read_table

Key = tuple[str, str]


class Encodings:
    """The encodings in one work folder, which are made when somebody asks for them, and their thread seconds."""

    def __init__(self, loaded: LoadedModel, formats: Formats, work: Path, workers: Workers) -> None:
        """`work` is a folder that `measure` has calibrated for `loaded`; `formats` are all candidates."""
        self.loaded, self.formats, self.workers, self.table = loaded, formats, workers, read_table(work)
        self.job = Job.at(work, str(self.table.settings["identity"]), int(self.table.settings["seed"] or 0))
        self.records: dict[Key, MeasurementRecord] = {}
        self._with_setup = work / "with_setup.json"

    def setup_seconds(self) -> dict[str, float]:
        """Matrix -> thread seconds by which its first trellis encoding exceeds the others: the median for its shape."""
        first, others = self.first_in_task(), defaultdict(list)
        known, _ = split_by_cache(self.loaded, self.formats, self.job)
        seconds_of = {(record.matrix, record.format): record.seconds for record in known}
        for (name, fmt), taken in seconds_of.items():
            if (name, fmt) not in first and _factorised(Format.parse(fmt)):
                others[name].append(taken)
        shapes = {m.name: (m.rows, m.cols) for m in self.loaded.matrices}
        found: dict[tuple[int, int], list[float]] = defaultdict(list)
        for name, fmt in first:
            if others[name] and (name, fmt) in seconds_of:
                found[shapes[name]].append(seconds_of[name, fmt] - float(np.mean(others[name])))
        seconds = {shape: max(float(np.median(values)), 0.0) for shape, values in found.items()}
        return {name: seconds.get(shape, 0.0) for name, shape in shapes.items()}

    def first_in_task(self) -> set[Key]:
        """The trellis candidates whose recorded seconds include the factorisation of their matrix."""
        if not self._with_setup.exists():
            return set()
        return {(name, fmt) for name, fmt in json.loads(self._with_setup.read_text(encoding="utf-8"))}

    def encode(self, formats: Formats) -> Measured:
        """The records of all these candidates."""
        _, missing = split_by_cache(self.loaded, formats, self.job)
        first = {(m.name, next((f.name for f in absent if _factorised(f)), "")) for m, absent in missing}
        write_text_atomic(self._with_setup, canonical_json(sorted(self.first_in_task() | first)))
        measured = measure_formats(self.loaded, formats, self.job, {}, self.workers)
        self.records |= {(record.matrix, record.format): record for record in measured.records}
        return measured

    def seconds(self, tasks: Sequence[tuple[str, Sequence[Format]]]) -> float:
        """Thread seconds of encoding matrices in some formats each, beginning with a factorisation of each matrix."""
        first, setup, total = self.first_in_task(), self.setup_seconds(), 0.0
        for name, formats in tasks:
            total += sum(self.records[name, f.name].seconds - setup[name] * ((name, f.name) in first) for f in formats)
            total += setup[name] * any(_factorised(f) for f in formats)
        return total

    def full_table(self) -> MeasuredTable:
        """The table of all candidates."""
        measured = self.encode(self.formats)
        return self.table.model_copy(update={"measurements": tuple(measured.records), "predictions": ()})


def _factorised(fmt: Format) -> bool:
    return isinstance(fmt.codec, TrellisCodec)


@dataclass(frozen=True)
class Rounds:
    """One budget: what was encoded, and the plan that came of it."""

    bits: float
    rounds: list[list[tuple[str, Sequence[Format]]]]
    """The tasks of each round: matrices with the formats in which they were encoded."""
    solver_seconds: float
    """Processor seconds of all solutions and predictions, with the reading of what was encoded before."""
    table: MeasuredTable
    plan: Plan

    @property
    def gap(self) -> float:
        """The gap that the plan states."""
        return 0.0 if self.plan.unmeasured is None else self.plan.unmeasured.gap

    @property
    def measured(self) -> set[Key]:
        """The candidates that were encoded."""
        return {(record.matrix, record.format) for record in self.table.measurements}

    def seconds(self, encodings: Encodings) -> tuple[float, float]:
        """Thread seconds of (all encoding, encoding the chosen candidates alone)."""
        known = self.measured
        once = [(c.matrix, [Format.parse(c.format)]) for c in self.plan.choices if (c.matrix, c.format) in known]
        return encodings.seconds([task for tasks in self.rounds for task in tasks]), encodings.seconds(once)


def run_rounds(encodings: Encodings, bits: float, gap: float) -> Rounds:
    """Run the rounds for `bits` per weight until the gap is at most `gap`."""
    options, budget, rounds = PlanOptions(), f"{bits:g}bpw", []

    def encode(*, formats: Formats) -> Measured:
        rounds.append([(name, wanted) for name, wanted in formats.items() if wanted])
        return encodings.encode(formats)

    empty = encodings.table.model_copy(update={"measurements": (), "predictions": ()})
    matrices = encodings.loaded.matrices
    needed = NeededMeasurement(empty, matrices, encodings.formats, encode, parse_budget(budget), options, gap)
    began = time.process_time()
    measured, predictions = needed.run([])
    found = {"measurements": tuple(measured.records), "predictions": tuple(predictions)}
    table = empty.model_copy(update=found)
    plan = solve(table, budget, options, work=str(encodings.job.cache.folder.parent))
    return Rounds(bits, rounds, time.process_time() - began, table, plan)


def accuracy(
    predictions: Sequence[PredictionRecord], full: MeasuredTable
) -> Iterator[tuple[str, int, float, float, float]]:
    """(format, predictions, mean and deviation of log(predicted / true two-sided cost), mean stated deviation)."""
    records = {(r.matrix, r.format): r for r in full.measurements}
    by_format: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for p in predictions:
        error = log(p.two_sided / records[p.matrix, p.format].two_sided)
        by_format[p.format].append((error, p.deviations["two_sided"]))
    for fmt, pairs in sorted(by_format.items()):
        errors, stated = np.array(pairs).T
        yield fmt, len(pairs), float(errors.mean()), float(errors.std()), float(np.sqrt(np.square(stated).mean()))


def linear_formats(loaded: LoadedModel, formats: Mapping[Kind, Sequence[Format]]) -> dict[str, list[Format]]:
    """`formats` of every linear layer, by name; none for the other matrices, which take no part."""
    return {m.name: [*formats["linear"]] if m.kind == "linear" else [] for m in loaded.matrices}
