"""What measuring a large model would take on many machines: on paper, from seconds measured on matrices that fit here.

    python -m benchmarks.cluster_paper     two bounds and the fit between them; about a minute

Encoding W[N, K] in the first format of a matrix takes s1 thread seconds, in a further one s2:

    s2 = a NK + b NK(N + K)                    the search, and the products of the two-sided feedback
    s1 = s2 + c (N^2 + K^2) + d (N^3 + K^3)    the metric's rotations, and its factorisations

a to d are fitted, in relative error, to SHAPES measured now and to benchmarks/results/encoding.json (all linears of
SmolLM2-135M). That file alone leaves open how its seconds beside the search split: all of them in proportion to the
matrix (a; c) is the least a larger one can take, none (b; d) the most. All candidates of the default space are counted
as this format. Bytes of a task: m x 4 (NK + N^2 + K^2), m the largest measured. Machines are filled
task by task, the longest first, while cores and memory last; a core is as fast with its neighbours busy. Calibration
runs on the one machine that asks, at the rate measured here for two cores times CORES / 2, and takes

    T sum (8 NK + 4 K^2 + 2 N^2) flops         forward, replay, gradient of the inputs, H, H_guided, F, G

over the matrices, for T tokens, at the rate measured here for two cores times CORES / 2.
"""

from __future__ import annotations

import heapq
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from benchmarks.peers import ROOT
from benchmarks.planner_instances import MODELS, Shape, llama
from reallm.codecs.encode import encode
from reallm.codecs.metric import Metric, Workspace
from reallm.kernels.formats.formats import Format
from reallm.kernels.storage.atomic import canonical_json, write_text_atomic
from reallm.measurement.search_space import load_space
from reallm.system.memory import peak_rss_bytes
from reallm.system.threads import one_thread

KEPT = ROOT / ".bench" / "cluster" / "shapes.json"
RESULTS = ROOT / "benchmarks" / "results" / "cluster_paper.json"
ENCODING = ROOT / "benchmarks" / "results" / "encoding.json"
FORMAT = "tq2-l12+ldl2+rot"
SHAPES = ((512, 512), (512, 2048), (2048, 512), (1024, 1024))
SMOLLM2 = llama(30, 576, 192, 1536)
PAPER = {"LLaMA-3-70B": llama(80, 8192, 1024, 28672), "LLaMA-3-405B": MODELS["LLaMA-3-405B"]}
MACHINES = (8, 64)
CORES, MEMORY_BYTES = 64, 1 << 40
"""Of a machine on paper: cores as fast as this one's, and 1 TiB."""
TOKENS = 16 * 1024
PARTS = ("search", "next rate", "encoder")
COPIES, FLOPS_PER_S = 8.0, 30e9
"""Assumed for the bounds, not measured: m, and what a core calibrates at."""


@dataclass(frozen=True)
class Scaling:
    """Thread seconds and bytes of encoding a matrix, and how far the fit is from what was measured."""

    again: tuple[float, float]
    """a, b"""
    once: tuple[float, float]
    """c, d"""
    copies: float
    """m"""
    worst: float
    """The largest relative error of a fitted time."""

    def seconds(self, rows: int, cols: int, formats: int) -> float:
        """Thread seconds of one task."""
        return formats * float(np.dot(self.again, _again(rows, cols))) + float(np.dot(self.once, _once(rows, cols)))

    def nbytes(self, rows: int, cols: int) -> float:
        """The most memory it holds."""
        return self.copies * 4 * (rows * cols + rows**2 + cols**2)


@dataclass(frozen=True)
class Estimate:
    """Of a model on so many machines."""

    model: str
    machines: int
    hours: float
    """Of encoding."""
    core_hours: float
    longest_hours: float
    """Of the longest task."""
    calibration_hours: float


def _again(rows: float, cols: float) -> list[float]:
    return [rows * cols, rows * cols * (rows + cols)]


def _once(rows: float, cols: float) -> list[float]:
    return [rows**2 + cols**2, rows**3 + cols**3]


def time_shapes() -> dict[str, dict[str, float]]:
    """By "NxK": seconds of the first format and of a further one, and bytes; in a process of its own, and kept."""
    if not KEPT.exists():
        command = [sys.executable, "-m", "benchmarks.cluster_paper", "time"]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        write_text_atomic(KEPT, found.splitlines()[-1])
    return dict(json.loads(KEPT.read_text(encoding="utf-8")))


def _time_here(rows: int, cols: int) -> dict[str, float]:
    torch.manual_seed(0)
    X, Y = torch.randn(512, cols), torch.randn(512, rows)
    metric = Metric(X.T @ X / 512, torch.zeros(rows, cols), gram=Y.T @ Y / 512)
    W, fmt = torch.randn(rows, cols), Format.parse(FORMAT)
    given = 4 * (2 * rows * cols + rows**2 + cols**2)  # W, F, H and G, which a task holds too
    work, before, began = Workspace(metric), peak_rss_bytes(), time.thread_time()
    encode(W, fmt, work)
    between = time.thread_time()
    encode(W, fmt, work)
    seconds = {"first": between - began, "again": time.thread_time() - between}
    return {**seconds, "bytes": float(peak_rss_bytes() - before + given)}


def measured_scaling() -> Scaling:
    """Fitted now."""
    times = time_shapes()
    found = {(rows, cols): times[f"{rows}x{cols}"] for rows, cols in SHAPES}
    whole = {row["figure"]: row["ours"] for row in json.loads(ENCODING.read_text(encoding="utf-8"))}
    again = whole["next rate, all linears, 2 bits, 2^12 states"]
    once = whole["encoder, all linears, 2 bits, 2^12 states"] - again
    a, far_a = _fit(_again, [(f["again"], [s]) for s, f in found.items()] + [(again, _sizes(SMOLLM2))])
    c, far_c = _fit(_once, [(f["first"] - f["again"], [s]) for s, f in found.items()] + [(once, _sizes(SMOLLM2))])
    copies = max(f["bytes"] / (4 * (rows * cols + rows**2 + cols**2)) for (rows, cols), f in found.items())
    return Scaling(a, c, copies, max(far_a, far_c))


def bounds() -> dict[str, Scaling]:
    """The least and the most that encoding.json allows, with COPIES for the memory."""
    whole = {row["figure"]: row["ours"] for row in json.loads(ENCODING.read_text(encoding="utf-8"))}
    search, again, first = (whole[f"{what}, all linears, 2 bits, 2^12 states"] for what in PARTS)
    linear, products = np.sum([_again(*shape) for shape in _sizes(SMOLLM2)], axis=0)
    square, cube = np.sum([_once(*shape) for shape in _sizes(SMOLLM2)], axis=0)
    least = Scaling((again / linear, 0.0), ((first - again) / square, 0.0), COPIES, 0.0)
    return {
        "least": least,
        "most": Scaling((search / linear, (again - search) / products), (0.0, (first - again) / cube), COPIES, 0.0),
    }


def _sizes(model: Iterable[Iterable[Shape]]) -> list[tuple[int, int]]:
    return [(rows, cols) for block in model for _, rows, cols in block]


def _fit(
    terms: Callable[[float, float], list[float]], measured: Sequence[tuple[float, Sequence[tuple[int, int]]]]
) -> tuple[tuple[float, float], float]:
    """(coefficients, none negative; the largest relative error) of `terms`, summed over shapes, for seconds."""
    A = np.array([np.sum([terms(*shape) for shape in shapes], axis=0) / seconds for seconds, shapes in measured])
    best, ones = np.zeros(2), np.ones(len(A))
    for kept in ([0, 1], [0], [1]):
        found = np.linalg.lstsq(A[:, kept], ones, rcond=None)[0]
        if (found >= 0).all():
            trial = np.zeros(2)
            trial[kept] = found
            if not best.any() or np.square(A @ trial - 1).sum() < np.square(A @ best - 1).sum():
                best = trial
    return (float(best[0]), float(best[1])), float(np.abs(A @ best - 1).max())


def estimates(scaling: Scaling, calibration_flops_per_s: float) -> list[Estimate]:
    """Of every model of PAPER on every number of MACHINES; the rate is of one core."""
    formats, made = len(load_space().formats["linear"]), []
    for name, model in PAPER.items():
        sizes = _sizes(model)
        tasks = [(scaling.seconds(*size, formats), scaling.nbytes(*size)) for size in sizes]
        calibration = calibration_flops(sizes, TOKENS) / (calibration_flops_per_s * CORES)
        for machines in MACHINES:
            hours = [
                s / 3600 for s in (makespan(tasks, machines), sum(s for s, _ in tasks), max(tasks)[0], calibration)
            ]
            made.append(Estimate(name, machines, *hours))
    return made


def calibration_flops(sizes: Iterable[tuple[int, int]], tokens: int) -> float:
    """Of one calibration pass."""
    return float(tokens) * sum(8 * rows * cols + 4 * cols**2 + 2 * rows**2 for rows, cols in sizes)


def makespan(tasks: Iterable[tuple[float, float]], machines: int) -> float:
    """Seconds until all (seconds, bytes) are done, the longest first, each on the first machine with room for it."""
    cores, memory = [CORES] * machines, [float(MEMORY_BYTES)] * machines
    ends: list[tuple[float, int, float]] = []
    now = 0.0
    for seconds, nbytes in sorted(tasks, reverse=True):
        assert nbytes <= MEMORY_BYTES, f"a task of {nbytes / 2**30:.0f} GiB fits no machine"
        while not (free := [i for i in range(machines) if cores[i] and memory[i] >= nbytes]):
            now, freed, returned = heapq.heappop(ends)
            cores[freed] += 1
            memory[freed] += returned
        place = max(free, key=memory.__getitem__)
        cores[place] -= 1
        memory[place] -= nbytes
        heapq.heappush(ends, (now + seconds, place, nbytes))
    return max((end for end, _, _ in ends), default=now)


def main() -> None:
    """Estimate by both bounds and by the fit, write and print."""
    found = {**bounds(), "fitted": measured_scaling()}
    rows = [{"scaling": name, **asdict(s), **asdict(e)} for name, s in found.items() for e in estimates(s, FLOPS_PER_S)]
    write_text_atomic(RESULTS, canonical_json(rows))
    print(canonical_json(rows))


if __name__ == "__main__":
    if sys.argv[1:] == ["time"]:
        with one_thread():
            _time_here(64, 64)
            print(json.dumps({f"{rows}x{cols}": _time_here(rows, cols) for rows, cols in SHAPES}))
    else:
        main()
