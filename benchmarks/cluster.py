"""Measuring on a Ray cluster gives the same bytes as measuring in local processes, even when workers die.

    make bench NAME=cluster [MODEL=...] [TEXT=calibration] [BLOCKS=4]

The first BLOCKS blocks of the model are measured in FORMATS by two local processes, then by a Ray cluster on this
machine (a head without cores, two nodes of one core). A worker process is killed after a third of the measurements, and
one of the two nodes with its worker after two thirds. All files of both results are compared byte for byte, except for
times and memory in JSON files. Both runs use the same calibration. The last rows are the estimate of cluster_paper.py.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.bench import Figure, machine
from benchmarks.cluster_paper import CORES, MEMORY_BYTES, TOKENS, calibration_flops, estimates, measured_scaling
from benchmarks.peers import ROOT
from reallm.cli.demo import fetch_model
from reallm.cli.tables import columns_table
from reallm.kernels.storage.atomic import canonical_json, write_text_atomic
from reallm.measurement.measure import measure
from reallm.measurement.workers.pool import Backend
from reallm.models.loaded import load_model
from reallm.planner.tables.measured_table import MeasuredTable
from tests.support.clusters import kill_an_encoder, local_cluster

FOLDER = ROOT / ".bench" / "cluster"
RESULTS = ROOT / "benchmarks" / "results" / "cluster.json"
FORMATS = ("tq2-l12+ldl2+rot", "tq3-l12+ldl2+rot", "lm4-g64-dq6x64+ldl")
NSAMPLES, SEQLEN = 1, 256
TIMES = frozenset({"base", "seconds"})


@dataclass(frozen=True)
class Row(Figure):
    """A figure, with a note on how it was obtained."""

    note: str


def small_model(console: Console) -> Path:
    """Save the first BLOCKS blocks of the model; returns the folder."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    blocks, folder = int(os.environ.get("BLOCKS") or 4), FOLDER / "base"
    source = load_model(os.environ.get("MODEL") or str(fetch_model(FOLDER, console)))
    source.model.model.layers = source.model.model.layers[:blocks]
    source.model.config.num_hidden_layers = blocks
    shutil.rmtree(folder, ignore_errors=True)
    source.model.save_pretrained(folder)
    assert source.tokenizer is not None
    source.tokenizer.save_pretrained(folder)
    return folder


def measured(model: Path, output: Path, backend: Backend, address: str | None = None) -> MeasuredTable:
    """Measure `model` into the folder `output`."""
    space = FOLDER / "space.yaml"
    space.write_text(f"linear: [{', '.join(FORMATS)}]\n", encoding="utf-8")
    text, jobs = os.environ.get("TEXT") or None, 2 if backend == "processes" else -1
    settings = {"text": text, "space": space, "nsamples": NSAMPLES, "seqlen": SEQLEN}
    return measure(model, output=output, **settings, jobs=jobs, backend=backend, ray_address=address)


@contextmanager
def killing(folder: Path, victims: list[tuple[int, Callable[[], bool]]]) -> Iterator[list[int]]:
    """Kill the victims (measurements in the cache, function that kills) in order, each once that many are there.

    Yields the list of the numbers of measurements at which they were killed, which grows meanwhile.
    """
    finished, killed = threading.Event(), []

    def watch() -> None:
        while not finished.wait(0.05) and len(killed) < len(victims):
            entries, kill = victims[len(killed)]
            measured = len(list(folder.glob("cache/*/*.json")))
            if measured >= entries and kill():
                killed.append(measured)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield killed
    finally:
        finished.set()
        thread.join()


def on_a_cluster(model: Path, output: Path, measurements: int) -> tuple[MeasuredTable, list[int]]:
    """The table, and the number of measurements when a worker and when a node was killed.

    Calibration is not repeated: the driver does it with any backend, so the statistics of the local run are reused.
    """
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(FOLDER / "local" / "statistics", output / "statistics")
    with local_cluster(2) as (cluster, nodes):

        def kill_a_node() -> bool:
            cluster.remove_node(nodes[0], allow_graceful=False)
            return True

        victims = [(measurements // 3, kill_an_encoder), (2 * measurements // 3, kill_a_node)]
        with killing(output, victims) as killed:
            table = measured(model, output, "ray", cluster.address)
    assert len(killed) == 2, "the run ended before both were killed: set BLOCKS higher"
    return table, killed


def _without_times(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_times(v) for key, v in value.items() if key not in TIMES}
    return [_without_times(v) for v in value] if isinstance(value, list) else value


def compare(left: Path, right: Path) -> tuple[int, int, list[str]]:
    """(identical files, JSON files that are identical without times, files that differ or are missing on one side).

    A killed worker may leave a hidden partial file behind; nothing reads it, so it is ignored.
    """
    files = [(folder, path) for folder in (left, right) for path in folder.rglob("*") if path.is_file()]
    names = {str(path.relative_to(folder)) for folder, path in files if path.suffix != ".partial"}
    alike, timed, different = 0, 0, []
    for name in sorted(names):
        one, other = left / name, right / name
        if not (one.exists() and other.exists()):
            different.append(name)
        elif one.read_bytes() == other.read_bytes():
            alike += 1
        elif name.endswith(".json") and _without_times(json.loads(one.read_text("utf-8"))) == _without_times(
            json.loads(other.read_text("utf-8"))
        ):
            timed += 1
        else:
            different.append(name)
    return alike, timed, different


def role_seconds(table: MeasuredTable) -> dict[str, float]:
    """Role -> mean thread seconds per matrix for all formats together."""
    total, count = defaultdict(float), defaultdict(set)
    roles = {m.name: f"{m.family} {m.rows}x{m.cols}" for m in table.matrices}
    for record in table.measurements:
        total[roles[record.matrix]] += record.seconds
        count[roles[record.matrix]].add(record.matrix)
    return {role: total[role] / len(count[role]) for role in total}


def calibration_rate(table: MeasuredTable) -> float:
    """Flops per second and core of the local run's calibration; the output head counts as a linear layer without G."""
    (report,) = (FOLDER / "local" / "statistics").glob("*/calibration.json")
    calibration, flops = json.loads(report.read_text(encoding="utf-8")), 0.0
    for m in table.matrices:
        flops += calibration_flops([(m.rows, m.cols)], calibration["tokens"])
        flops -= 0 if m.kind == "linear" else 2.0 * calibration["tokens"] * m.rows**2
    return flops / calibration["seconds"] / 2


def main() -> None:
    """Run both, compare, estimate, write and print."""
    console = Console()
    model = small_model(console)
    shutil.rmtree(FOLDER / "local", ignore_errors=True)
    local = measured(model, FOLDER / "local", "processes")
    cluster, killed = on_a_cluster(model, FOLDER / "ray", len(local.measurements))
    alike, timed, different = compare(FOLDER / "local", FOLDER / "ray")
    versions = {"reallm": version("reallm"), "torch": torch.__version__, "ray": version("ray")}
    rows: list[Row] = []

    def add(figure: str, unit: str, ours: float, peer_name: str, peer: float | None, note: str) -> None:
        ratio = ours / peer if peer else None
        rows.append(Row(figure, unit, ours, peer_name, peer, ratio, versions, machine(), note))

    what = f"{alike} files alike to the byte, {timed} JSON files alike without their times; {', '.join(different[:3])}"
    add("files that differ between a cluster and local processes", "files", len(different), "target", 0.0, what)
    where = f"a worker killed at {killed[0]}, a node at {killed[1]} of {len(local.measurements)} measurements"
    seconds = [table.base["measurement_seconds"] for table in (cluster, local)]
    add("encoding on two Ray nodes of one core", "wall s", seconds[0], "two processes", seconds[1], where)
    for role, thread_seconds in role_seconds(local).items():
        add(f"a matrix, {role}", "thread s", thread_seconds, "", None, f"in {', '.join(FORMATS)}")
    scaling = measured_scaling()
    note = f"NK {scaling.again[0]:.3g}, NK(N+K) {scaling.again[1]:.3g}, N^2+K^2 {scaling.once[0]:.3g}"
    note += f", N^3+K^3 {scaling.once[1]:.3g} s; {scaling.copies:.1f} times the bytes of W, H and G"
    add("the fitted times, worst relative error", "", scaling.worst, "", None, note)
    rate = calibration_rate(local)
    add("calibration", "flop/s a core", rate, "", None, f"{NSAMPLES} windows of {SEQLEN} tokens, two cores")
    for e in estimates(scaling, rate):
        note = f"{e.core_hours:.0f} core hours; the longest matrix {e.longest_hours:.2f} h; calibration of {TOKENS} "
        note += f"tokens on one machine {e.calibration_hours:.1f} h; {CORES} cores, {MEMORY_BYTES >> 30} GiB a machine"
        add(f"on paper: encoding {e.model}, {e.machines} machines", "h", e.hours, "", None, note)
    write_text_atomic(RESULTS, canonical_json([asdict(row) for row in rows]))
    lines = [[r.figure, f"{r.ours:.4g} {r.unit}", "" if r.peer is None else f"{r.peer:.4g}", r.note] for r in rows]
    table = columns_table(f"a cluster on {machine()}", ("figure", "ours", "beside", "note"), lines)
    console.print(table)
    assert not different, f"{len(different)} files differ, such as {different[0]}"


if __name__ == "__main__":
    main()
