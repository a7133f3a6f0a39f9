"""`reallm compress`: what encoding only what the optimum needs costs and loses, and whole jobs beside those of peers.

    make bench NAME=compress [TEXT=calibration] [TEST=held-out] [MODEL=...] [JOBS=2] [PARTS=rounds,full,jobs,peers]

For every budget the rounds of `measure --budget` run from an empty folder ("rounds"), then every candidate is encoded
and the plan is compared with the optimum of the full table ("full"). "jobs" are `reallm compress` as a user runs it,
which must encode the same bytes; "peers" are whole jobs of other methods on the same calibration windows. All parts
resume; parts that are not run keep the results of an earlier run.
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

from benchmarks.bench import SEQLEN, Bench, Measured, bench_from_environment, machine, planned
from benchmarks.compress_jobs import differing, run_job
from benchmarks.compress_rounds import Encodings, Rounds, accuracy, linear_formats, run_rounds
from benchmarks.peers import ROOT, Peer
from reallm.cli.tables import columns_table
from reallm.kernels.formats.formats import Format
from reallm.kernels.storage.atomic import canonical_json, write_text_atomic
from reallm.measurement.measure import measure
from reallm.measurement.needed import DEFAULT_GAP
from reallm.measurement.search_space import Space, load_space
from reallm.measurement.workers.pool import open_workers
from reallm.planner.results.allocate import solve
from reallm.planner.tables.work_folder import read_table

RESULTS = ROOT / "benchmarks" / "results" / "compress.json"
BUDGETS = (2.0, 2.5, 3.0, 3.5, 4.0)
JOBS = (2.0, 3.0, 4.0)
PEERS = (Peer("GPTQ", 2, 64), Peer("GPTQ", 3, 64), Peer("GPTQ", 4, 64), Peer("AutoRound", 3, 64))
PARTS = ("rounds", "full", "jobs", "peers")
ANCHOR = Format.parse("tq3-l12+ldl2+rot")
"""The format in which the work folder's first table is measured."""


class Results:
    """The JSON file of results, written after every figure."""

    def __init__(self) -> None:
        earlier = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        self.values: dict[str, Any] = {"rounds": {}, "accuracy": {}, "jobs": {}, "setting": {}} | earlier

    def update(self, part: str, name: str, **values: Any) -> None:
        """Add or replace values of one entry."""
        self.values[part][name] = self.values[part].get(name, {}) | values
        write_text_atomic(RESULTS, canonical_json(self.values))


@contextmanager
def opened(bench: Bench, results: Results) -> Iterator[Encodings]:
    """The encodings of the benchmark's work folder, which is calibrated first."""
    work, calibration = bench.folder / "compress" / "full", bench.folder / "compress" / "calibration.json"
    jobs = int(os.environ.get("JOBS") or -1)
    if not (work / "table.json").exists() or not calibration.exists():
        space = Space("anchors", load_space(None).formats | {"linear": (ANCHOR,), "embedding": ()})
        settings = {"nsamples": bench.nsamples, "seqlen": SEQLEN, "jobs": jobs}
        table = measure(bench.base_folder, text=bench.text, output=work, space=space, **settings)
        if not calibration.exists():
            write_text_atomic(calibration, canonical_json({"seconds": table.base["calibration_processor_seconds"]}))
        first = [[record.matrix, record.format] for record in table.measurements]
        write_text_atomic(work / "with_setup.json", canonical_json(first))
    seconds = json.loads(calibration.read_text(encoding="utf-8"))["seconds"]
    results.update("setting", "calibration", windows=bench.nsamples, processor_seconds=seconds)
    with open_workers("processes", jobs) as workers:
        yield Encodings(bench.base, work, workers)


def report_rounds(bench: Bench, results: Results, found: Rounds, candidates: int) -> None:
    """Evaluate the plan of one budget and write the figures of its rounds."""
    results.update(
        "rounds",
        f"{found.bits:g}",
        encoded=len(found.measured),
        candidates=candidates,
        rounds=found.rounds,
        encoding_seconds=found.encoding_seconds,
        once_seconds=found.once_seconds,
        time_ratio=found.time_ratio,
        solver_seconds=found.solver_seconds,
        gap=found.gap,
        kl=planned(bench, "compress", found.plan).kl,
    )


def compare(bench: Bench, results: Results, encodings: Encodings, all_rounds: list[Rounds]) -> None:
    """Compare the plans with the optima of the full table, and the predictions with its costs."""
    full = encodings.full_table(linear_formats(bench.base, load_space(None).formats))
    results.update("setting", "full table", encoding_seconds=sum(record.seconds for record in full.measurements))
    for found in all_rounds:
        name = f"{found.bits:g}"
        optimum = solve(full, f"{name}bpw", work=str(encodings.job.cache.folder.parent))
        ours = {choice.matrix: choice.format for choice in found.plan.choices}
        least = 0.0 if found.plan.unmeasured is None else found.plan.unmeasured.least_loss
        results.update(
            "rounds",
            name,
            loss_ratio=found.plan.predicted_loss / optimum.predicted_loss,
            optimum_above_bound=least <= optimum.predicted_loss,
            other_choices=sum(ours[c.matrix] != c.format for c in optimum.choices),
            optimum_kl=planned(bench, "compress", optimum).kl,
        )
        for fmt, count, mean, deviation, stated in accuracy(found.table.predictions, full):
            values = {"predictions": count, "mean": mean, "deviation": deviation, "stated": stated}
            results.update("accuracy", f"{name} {fmt}", **values)


def report_jobs(bench: Bench, results: Results, encodings: Encodings, all_rounds: list[Rounds], gap: float) -> None:
    """Run whole jobs, and check that they encoded what the rounds did, byte for byte."""
    calibration = results.values["setting"]["calibration"]["processor_seconds"]
    for found in all_rounds:
        if found.bits not in JOBS:
            continue
        folder = bench.folder / "compress" / f"job-{found.bits:g}"
        job = run_job(bench, encodings.job.cache.folder.parent, folder, found.bits, gap)
        table = read_table(folder / "work")
        assert {(r.matrix, r.format) for r in table.measurements} == found.measured
        assert not (others := differing(table, found.table)), f"encoded otherwise: {others}"
        results.update(
            "jobs",
            f"reallm {found.bits:g} bits",
            bits_per_weight=found.plan.bits_per_weight,
            kl=planned(bench, "compress", found.plan).kl,
            processor_seconds=job.processor_seconds + calibration,
            peak_rss_bytes=job.peak_rss_bytes,
            encoding_seconds=job.encoding_seconds,
            encoding_ratio=job.encoding_seconds / found.once_seconds,
            equal_records=len(table.measurements),
        )


def report_peer(results: Results, theirs: Measured) -> None:
    """Write the whole job of one peer."""
    values = asdict(theirs)
    kept = ("bits_per_weight", "kl", "processor_seconds", "peak_rss_bytes", "versions")
    results.update("jobs", theirs.name, **{key: values[key] for key in kept})


def main() -> None:
    """Run the parts, write and print."""
    console, results = Console(), Results()
    parts = (os.environ.get("PARTS") or ",".join(PARTS)).split(",")
    gap = float(os.environ.get("GAP") or DEFAULT_GAP)
    bench = bench_from_environment(console)
    results.update("setting", "run", machine=machine(), gap=gap, model=Path(bench.base.source).name)
    results.update("setting", "versions", reallm=version("reallm"), torch=torch.__version__)
    with opened(bench, results) as encodings:
        formats, all_rounds = linear_formats(bench.base, load_space(None).formats), []
        for bits in BUDGETS:
            all_rounds.append(run_rounds(encodings, formats, bits, gap))
            if "rounds" in parts:
                report_rounds(bench, results, all_rounds[-1], sum(map(len, formats.values())))
        if "full" in parts:
            compare(bench, results, encodings, all_rounds)
        if "jobs" in parts:
            report_jobs(bench, results, encodings, all_rounds, gap)
    if "peers" in parts:
        for peer in PEERS:
            report_peer(results, bench.peer(peer))
    show(results, console)


def show(results: Results, console: Console) -> None:
    """Print the tables of the page."""
    columns = ("encoded", "candidates", "time_ratio", "gap", "loss_ratio", "kl", "optimum_kl")
    rows = [[bits, *(_text(entry.get(c)) for c in columns)] for bits, entry in results.values["rounds"].items()]
    headings = ("bits", "encoded", "of", "time / once", "stated gap", "loss / optimum", "KL", "optimum's KL")
    console.print(columns_table("encoding only what the optimum needs", headings, rows))
    columns = ("bits_per_weight", "kl", "processor_seconds", "encoding_ratio", "equal_records")
    rows = [[name, *(_text(entry.get(c)) for c in columns)] for name, entry in results.values["jobs"].items()]
    headings = ("job", "bits per weight", "KL", "processor s", "encoding / once", "equal records")
    console.print(columns_table("whole jobs", headings, rows))
    columns = ("predictions", "mean", "deviation", "stated")
    rows = [[name, *(_text(entry.get(c)) for c in columns)] for name, entry in results.values["accuracy"].items()]
    headings = ("bits, format", "predictions", "mean error", "deviation", "stated")
    console.print(columns_table("logarithm of predicted / measured cost", headings, rows))


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    main()
