"""The rounds of `measure --budget` from an empty folder, with encodings that several budgets share.

Encoding is deterministic, so that a record is the same whichever budget asked for it first; the whole jobs of
NAME=compress encode everything anew, and compare. A matrix that is encoded in several rounds is factorised in each of
them: its seconds are counted with one factorisation per round, whenever its formats were really encoded.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import log
from pathlib import Path

import numpy as np

from reallm.codecs.encode import encode
from reallm.codecs.metric import Workspace
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
from reallm.planner.tables.measured_table import MeasuredTable, MeasurementRecord, PredictionRecord
from reallm.planner.tables.plan import Plan
from reallm.planner.tables.work_folder import read_table
from reallm.system.threads import one_thread

Key = tuple[str, str]
BLOCKS = (4, 14, 24)
"""The blocks in which factorisations are timed."""
TIMED = Format.parse("tq3-l12+ldl2+rot")


class Encodings:
    """The encodings in one work folder, which are made when somebody asks for them, and their thread seconds."""

    def __init__(self, loaded: LoadedModel, work: Path, workers: Workers) -> None:
        """`work` is a folder that `measure` has calibrated for `loaded`."""
        self.loaded, self.workers, self.table = loaded, workers, read_table(work)
        self.job = Job.at(work, str(self.table.settings["identity"]), int(self.table.settings["seed"] or 0))
        self.records: dict[Key, MeasurementRecord] = {}
        self._with_setup = work / "with_setup.json"
        self._setup_file = work / "setup.json"
        self.setup = self._timed_setup()

    def _timed_setup(self) -> dict[str, float]:
        """Matrix -> thread seconds by which a first trellis encoding exceeds the next: the median for its shape."""
        if not self._setup_file.exists():
            found: dict[tuple[int, int], list[float]] = defaultdict(list)
            with one_thread():
                for matrix in self.loaded.matrices:
                    if matrix.block in BLOCKS and matrix.kind == "linear":
                        work, weight = Workspace(self.job.metric(matrix)), self.loaded.weight(matrix)
                        began = time.thread_time()
                        encode(weight, TIMED, work)
                        between = time.thread_time()
                        encode(weight, TIMED, work)
                        found[matrix.rows, matrix.cols].append(2 * between - began - time.thread_time())
            seconds = {shape: max(float(np.median(values)), 0.0) for shape, values in found.items()}
            linear = [m for m in self.loaded.matrices if m.kind == "linear"]
            write_text_atomic(self._setup_file, canonical_json({m.name: seconds[m.rows, m.cols] for m in linear}))
        result: dict[str, float] = json.loads(self._setup_file.read_text(encoding="utf-8"))
        return result

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

    def task_seconds(self, name: str, formats: Sequence[Format]) -> float:
        """Thread seconds of encoding one matrix in `formats`, beginning with its factorisation."""
        first, setup = self.first_in_task(), self.setup.get(name, 0.0)
        alone = sum(self.records[name, f.name].seconds - setup * ((name, f.name) in first) for f in formats)
        return alone + setup * any(_factorised(f) for f in formats)

    def full_table(self, formats: Formats) -> MeasuredTable:
        """The table of all candidates."""
        return self.table.model_copy(update={"measurements": tuple(self.encode(formats).records), "predictions": ()})


def _factorised(fmt: Format) -> bool:
    return isinstance(fmt.codec, TrellisCodec)


@dataclass
class _Counted:
    """Encodes for one budget, and counts."""

    encodings: Encodings
    seconds: float = 0.0
    rounds: list[int] = field(default_factory=list)

    def __call__(self, *, formats: Formats) -> Measured:
        measured = self.encodings.encode(formats)
        self.seconds += sum(self.encodings.task_seconds(name, fmts) for name, fmts in formats.items())
        self.rounds.append(sum(len(fmts) for fmts in formats.values()))
        return measured


@dataclass(frozen=True)
class Rounds:
    """One budget: what was encoded, and the plan that came of it."""

    bits: float
    rounds: list[int]
    """Candidates encoded in each round."""
    encoding_seconds: float
    once_seconds: float
    """Thread seconds of encoding the chosen candidates alone."""
    solver_seconds: float
    """Processor seconds of all solutions and predictions."""
    table: MeasuredTable
    plan: Plan

    @property
    def time_ratio(self) -> float:
        """Seconds of all encoding, in units of encoding the model once at this rate."""
        return self.encoding_seconds / self.once_seconds

    @property
    def gap(self) -> float:
        """The gap that the plan states."""
        return 0.0 if self.plan.unmeasured is None else self.plan.unmeasured.gap

    @property
    def measured(self) -> set[Key]:
        """The candidates that were encoded."""
        return {(record.matrix, record.format) for record in self.table.measurements}


def run_rounds(encodings: Encodings, formats: Formats, bits: float, gap: float) -> Rounds:
    """Run the rounds for `bits` per weight until the gap is at most `gap`."""
    counted, options, budget = _Counted(encodings), PlanOptions(), f"{bits:g}bpw"
    empty = encodings.table.model_copy(update={"measurements": (), "predictions": ()})
    needed = NeededMeasurement(empty, encodings.loaded.matrices, formats, counted, parse_budget(budget), options, gap)
    began = time.process_time()
    measured, predictions = needed.run([])
    found = {"measurements": tuple(measured.records), "predictions": tuple(predictions)}
    table = empty.model_copy(update=found)
    plan = solve(table, budget, options, work=str(encodings.job.cache.folder.parent))
    spent = time.process_time() - began
    once = [(c.matrix, Format.parse(c.format)) for c in plan.choices if (c.matrix, c.format) in encodings.records]
    return Rounds(
        bits=bits,
        rounds=counted.rounds,
        encoding_seconds=counted.seconds,
        once_seconds=sum(encodings.task_seconds(name, [fmt]) for name, fmt in once),
        solver_seconds=spent,
        table=table,
        plan=plan,
    )


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


def linear_formats(loaded: LoadedModel, formats: Mapping[str, Sequence[Format]]) -> dict[str, list[Format]]:
    """`formats` of every linear layer, by name; none for the other matrices, which take no part."""
    return {m.name: [*formats["linear"]] if m.kind == "linear" else [] for m in loaded.matrices}
