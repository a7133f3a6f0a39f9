"""Speed of the trellis encoder: thread seconds for all decoder linears of the model at two bits per weight.

    make bench NAME=encoding [MODEL=...] [TEXT=calibration] [TEST=held-out]

Run after NAME=quality; it uses that benchmark's statistics. "search" is the Viterbi search alone, on normal weights in
the model's shapes; "encoder" is all of `codecs.encode`: rotation, factorisations, feedback, search, scales, packing;
"next rate" is the same for a further candidate of a matrix, which reuses rotations and factorisations. One thread.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from importlib.metadata import version

import torch
from rich.console import Console

from benchmarks.bench import Bench, Figure, bench_from_environment, machine
from benchmarks.peers import ROOT
from reallm.cli.tables import columns_table
from reallm.codecs.encode import encode
from reallm.codecs.metric import Workspace
from reallm.codecs.trellis.encode import CLIPS, SCALES
from reallm.codecs.trellis.viterbi import closed_walks
from reallm.codegen.cpu.compiler import machine_tier
from reallm.kernels.formats.codecs import TILE
from reallm.kernels.formats.formats import Format
from reallm.kernels.storage.atomic import canonical_json, write_text_atomic
from reallm.measurement.encoding import Job
from reallm.models.loaded import Matrix
from reallm.planner.tables.measured_table import TABLE_FILE, MeasuredTable
from reallm.planner.tables.records import read_record
from reallm.system.threads import one_thread

RESULTS = ROOT / "benchmarks" / "results" / "encoding.json"
TARGETS = {10: 60.0, 12: 180.0}
"""State bits -> target of the thread seconds for the whole model."""
WIDTH = 4
"""Bits per weight in units of half a bit: two bits."""
SHARE = 5
"""Every fifth block is encoded and its time counted five times."""


def search_seconds(matrices: list[Matrix], state_bits: int) -> float:
    """Thread seconds of the search alone, for `matrices`."""
    generator, total = torch.Generator().manual_seed(0), 0.0
    for matrix in matrices:
        rows, blocks = -(-matrix.rows // TILE) * TILE, -(-matrix.cols // TILE)
        for _ in range(blocks):
            x = torch.randn(rows, TILE, generator=generator) / SCALES[WIDTH]
            began = time.thread_time()
            closed_walks(x, state_bits, WIDTH, CLIPS[WIDTH], None)
            total += time.thread_time() - began
    return total


def encoder_seconds(bench: Bench, matrices: list[Matrix], state_bits: int) -> tuple[float, float]:
    """Thread seconds of encoding `matrices` once, and of encoding them again with the same workspace."""
    table = read_record(bench.work / TABLE_FILE, MeasuredTable, "measure")
    job = Job.at(bench.work, str(table.settings["identity"]), 0)
    fmt, first, again = Format.parse(f"tq{WIDTH / 2:g}-l{state_bits}+ldl2+rot"), 0.0, 0.0
    for matrix in matrices:
        metric, weight = job.metric(matrix), bench.base.weight(matrix)
        work, began = Workspace(metric), time.thread_time()
        encode(weight, fmt, work)
        between = time.thread_time()
        encode(weight, fmt, work)
        first, again = first + between - began, again + time.thread_time() - between
    return first, again


def main() -> None:
    """Time both, write and print."""
    console = Console()
    bench = bench_from_environment(console)
    some = [m for m in bench.base.matrices if m.kind == "linear" and m.block is not None and m.block % SHARE == 0]
    versions, rows = {"reallm": version("reallm"), "torch": torch.__version__, "tier": machine_tier()}, []
    with one_thread():
        for state_bits, target in TARGETS.items():
            first, again = encoder_seconds(bench, some, state_bits)
            parts = {"search": search_seconds(some, state_bits), "next rate": again, "encoder": first}
            for what, seconds in parts.items():
                figure = f"{what}, all linears, 2 bits, 2^{state_bits} states"
                ours = SHARE * seconds
                rows.append(Figure(figure, "thread s", ours, "target", target, ours / target, versions, machine()))
    write_text_atomic(RESULTS, canonical_json([asdict(row) for row in rows]))
    lines = [[r.figure, f"{r.ours:.1f}", f"{r.peer:.0f}", f"{r.ratio:.2f}"] for r in rows]
    console.print(columns_table(f"encoding on {machine()}", ("figure", "thread s", "target", "ratio"), lines))


if __name__ == "__main__":
    main()
