"""`reallm compress`: what encoding only what the optimum needs costs and loses, and whole jobs beside those of peers.

    make bench NAME=compress [TEXT=calibration] [TEST=held-out] [MODEL=...] [SPACE=...] [JOBS=2]
        [NSAMPLES=64] [BUDGETS=2,2.5,3,3.5,4] [JOB_BITS=2,3,4] [PARTS=full,kl,jobs,peers]

For every budget the rounds of `measure --budget` run from an empty folder. "full" encodes every candidate, and compares
each plan with the optimum of the full table; "kl" measures the losses of both on WINDOWS windows of TEST. "jobs" are
`reallm compress` as a user runs it, which must encode the same bytes; "peers" are whole jobs of other methods, on up to
16 windows of the same text. All parts resume; parts that are not run keep the results of an earlier run. TEXT=python
calibrates on Python's documentation.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.bench import DEFAULT_TEST, DEFAULT_TEXT, FOLDER, SEQLEN, Bench, Measured, machine
from benchmarks.compress_jobs import differing, run_job
from benchmarks.compress_rounds import Encodings, Rounds, accuracy, linear_formats, run_rounds
from benchmarks.peers import ROOT, Peer
from reallm.cli.demo import fetch_model
from reallm.cli.tables import columns_table
from reallm.kernels.storage.atomic import canonical_json, write_text_atomic
from reallm.measurement.measure import measure
from reallm.measurement.needed import DEFAULT_GAP
from reallm.measurement.search_space import Space, load_space
from reallm.measurement.workers.pool import open_workers
from reallm.planner.results.allocate import solve
from reallm.planner.tables.plan import Plan
from reallm.planner.tables.work_folder import read_table
from reallm.planning.plan_evaluator import PlanEvaluator

RESULTS = ROOT / "benchmarks" / "results" / "compress.json"
BUDGETS, JOB_BITS = "2,2.5,3,3.5,4", "2,3,4"
PEERS = (Peer("GPTQ", 2, 64), Peer("GPTQ", 3, 64), Peer("GPTQ", 4, 64), Peer("AutoRound", 3, 64))
PARTS = "full,kl,jobs,peers"
NSAMPLES, WINDOWS = 64, 3
TABLES: tuple[tuple[str, str, dict[str, str]], ...] = (
    (
        "rounds",
        "encoding only what the optimum needs, by bits per weight",
        {
            "encoded": "encoded",
            "candidates": "of",
            "time_ratio": "time / once",
            "gap": "stated gap",
            "loss_ratio": "loss / optimum",
            "kl": "KL",
            "optimum_kl": "optimum's KL",
            "kl_ratio": "ratio",
        },
    ),
    (
        "jobs",
        "whole jobs",
        {
            "bits_per_weight": "bits per weight",
            "kl": "KL",
            "processor_seconds": "processor s",
            "without_calibration": "without calibration",
            "encoding_ratio": "encoding / once",
            "equal_records": "equal records",
        },
    ),
    (
        "accuracy",
        "logarithm of predicted / measured cost, of what was not encoded",
        {"predictions": "predictions", "mean": "mean", "deviation": "deviation", "stated": "stated deviation"},
    ),
)
"""Part of the results, title, and JSON key -> heading of the tables that are printed."""


class Results:
    """The results of one setting in the JSON file, which is written after every figure."""

    def __init__(self, setting: str) -> None:
        self.everything: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        empty: dict[str, Any] = {"rounds": {}, "accuracy": {}, "jobs": {}, "setting": {}}
        self.values = self.everything[setting] = empty | self.everything.get(setting, {})

    def update(self, part: str, name: str, **values: Any) -> None:
        """Add or replace values of one entry."""
        self.values[part][name] = self.values[part].get(name, {}) | values
        write_text_atomic(RESULTS, canonical_json(self.everything))


def folder(bench: Bench) -> Path:
    """Where everything of one setting is kept."""
    return bench.folder / f"compress-{Path(os.environ.get('SPACE') or 'default').stem}-{bench.nsamples}"


@contextmanager
def opened(bench: Bench, results: Results) -> Iterator[Encodings]:
    """The encodings of the benchmark's work folder, which is calibrated first."""
    work = folder(bench) / "full"
    calibration = work / "calibration.json"
    jobs = int(os.environ.get("JOBS") or -1)
    if not (work / "table.json").exists():
        formats = load_space(os.environ.get("SPACE")).formats
        space = Space("first", {**formats, "linear": formats["linear"][:1], "embedding": ()})
        table = measure(
            bench.base_folder,
            text=bench.text,
            output=work,
            space=space,
            nsamples=bench.nsamples,
            seqlen=SEQLEN,
            jobs=jobs,
        )
        write_text_atomic(calibration, canonical_json({"seconds": table.base["calibration_processor_seconds"]}))
        first = [[record.matrix, record.format] for record in table.measurements]
        write_text_atomic(work / "with_setup.json", canonical_json(first))
    seconds = json.loads(calibration.read_text(encoding="utf-8"))["seconds"]
    results.update("setting", "calibration", windows=bench.nsamples, processor_seconds=seconds)
    with open_workers("processes", jobs) as workers:
        yield Encodings(
            bench.base, linear_formats(bench.base, load_space(os.environ.get("SPACE")).formats), work, workers
        )


def report_rounds(results: Results, encodings: Encodings, found: Rounds) -> None:
    """Write the figures of the rounds of one budget."""
    everything, once = found.seconds(encodings)
    results.update(
        "rounds",
        f"{found.bits:g}",
        encoded=len(found.measured),
        candidates=sum(map(len, encodings.formats.values())),
        rounds=[sum(len(formats) for _, formats in tasks) for tasks in found.rounds],
        encoding_seconds=everything,
        once_seconds=once,
        time_ratio=everything / once,
        solver_seconds=found.solver_seconds,
        gap=found.gap,
    )


def compare(results: Results, encodings: Encodings, all_rounds: list[Rounds]) -> dict[float, Plan]:
    """Compare the plans with the optima of the full table, and the predictions with its costs; returns the optima."""
    optima = {}
    full = encodings.full_table()
    results.update("setting", "full table", encoding_seconds=sum(record.seconds for record in full.measurements))
    for found in all_rounds:
        name = f"{found.bits:g}"
        optimum = optima[found.bits] = solve(full, f"{name}bpw", work=str(encodings.job.cache.folder.parent))
        ours = {choice.matrix: choice.format for choice in found.plan.choices}
        least = 0.0 if found.plan.unmeasured is None else found.plan.unmeasured.least_loss
        results.update(
            "rounds",
            name,
            loss_ratio=found.plan.predicted_loss / optimum.predicted_loss,
            optimum_above_bound=least <= optimum.predicted_loss,
            other_choices=sum(ours[c.matrix] != c.format for c in optimum.choices),
        )
        for fmt, count, mean, deviation, stated in accuracy(found.table.predictions, full):
            values = {"predictions": count, "mean": mean, "deviation": deviation, "stated": stated}
            results.update("accuracy", f"{name} {fmt}", **values)
    return optima


def report_losses(bench: Bench, results: Results, all_rounds: list[Rounds], optima: dict[float, Plan]) -> None:
    """Measure the KL of every plan and of the optimum, on the same windows."""
    losses = PlanEvaluator(bench.base, folder(bench) / "full", bench.windows)
    losses.dense = bench.dense
    for found in all_rounds:
        name = f"{found.bits:g}"
        results.update("rounds", name, kl=losses.loss(found.plan))
        if found.bits in optima:
            kl = losses.loss(optima[found.bits])
            results.update("rounds", name, optimum_kl=kl, kl_ratio=results.values["rounds"][name]["kl"] / kl)


def report_jobs(bench: Bench, results: Results, encodings: Encodings, all_rounds: list[Rounds], gap: float) -> None:
    """Run whole jobs, and check that they encoded what the rounds did, byte for byte."""
    calibration = results.values["setting"]["calibration"]["processor_seconds"]
    wanted = [float(bits) for bits in (os.environ.get("JOB_BITS") or JOB_BITS).split(",")]
    for found in (rounds for rounds in all_rounds if rounds.bits in wanted):
        place = folder(bench) / f"job-{found.bits:g}"
        job = run_job(bench, encodings.job.cache.folder.parent, place, found.bits, gap)
        table = read_table(place / "work")
        assert {(r.matrix, r.format) for r in table.measurements} == found.measured
        assert not (others := differing(table, found.table)), f"encoded otherwise: {others}"
        results.update(
            "jobs",
            f"reallm {found.bits:g} bits",
            bits_per_weight=found.plan.bits_per_weight,
            kl=results.values["rounds"][f"{found.bits:g}"].get("kl"),
            processor_seconds=None if calibration is None else job.processor_seconds + calibration,
            without_calibration=job.processor_seconds,
            peak_rss_bytes=job.peak_rss_bytes,
            encoding_seconds=job.encoding_seconds,
            encoding_ratio=job.encoding_seconds / found.seconds(encodings)[1],
            equal_records=len(table.measurements),
        )


def report_peer(results: Results, theirs: Measured) -> None:
    """Write the whole job of one peer."""
    values = asdict(theirs)
    kept = ("bits_per_weight", "kl", "processor_seconds", "peak_rss_bytes", "versions")
    results.update("jobs", theirs.name, **{key: values[key] for key in kept})


def main() -> None:
    """Run the parts, write and print."""
    console = Console()
    parts = (os.environ.get("PARTS") or PARTS).split(",")
    gap = float(os.environ.get("GAP") or DEFAULT_GAP)
    FOLDER.mkdir(parents=True, exist_ok=True)
    text, test = os.environ.get("TEXT") or DEFAULT_TEXT, os.environ.get("TEST") or DEFAULT_TEST
    model = os.environ.get("MODEL") or str(fetch_model(FOLDER, console))
    nsamples = int(os.environ.get("NSAMPLES") or NSAMPLES)
    bench = Bench(model, None if text == "python" else text, test, nsamples, WINDOWS)
    results = Results(folder(bench).name.removeprefix("compress-"))
    results.update("setting", "run", machine=machine(), gap=gap, model=Path(model).name)
    results.update("setting", "texts", calibration=Path(text).name, test=Path(test).name)
    results.update("setting", "versions", reallm=version("reallm"), torch=torch.__version__)
    with opened(bench, results) as encodings:
        budgets = [float(bits) for bits in (os.environ.get("BUDGETS") or BUDGETS).split(",")]
        all_rounds = [run_rounds(encodings, bits, gap) for bits in budgets]
        optima = compare(results, encodings, all_rounds) if "full" in parts else {}
        for found in all_rounds:
            report_rounds(results, encodings, found)
        if "kl" in parts:
            report_losses(bench, results, all_rounds, optima)
        if "jobs" in parts:
            report_jobs(bench, results, encodings, all_rounds, gap)
    if "peers" in parts:
        for peer in PEERS:
            report_peer(results, bench.peer(peer))
    show(results, console)


def show(results: Results, console: Console) -> None:
    """Print the tables of the page."""
    for part, title, columns in TABLES:
        rows = [
            [name, *("" if (value := entry.get(key)) is None else f"{value:.4g}" for key in columns)]
            for name, entry in results.values[part].items()
        ]
        console.print(columns_table(title, (part, *columns.values()), rows))


if __name__ == "__main__":
    main()
