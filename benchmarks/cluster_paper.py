"""Estimates how long measuring a large model takes on many machines, from times of matrices that fit here.

    python -m benchmarks.cluster_paper     two bounds and the fit between them, in about a minute

Encoding W[N, K] takes s1 thread seconds in the first format of a matrix and s2 in each further one:

    s2 = a NK + b NK(N + K)                    the search, and the products of the two-sided feedback
    s1 = s2 + c (N^2 + K^2) + d (N^3 + K^3)    the metric's rotations, and its factorisations

a to d are fitted, in relative error, to SHAPES measured now and to benchmarks/results/encoding.json (all linears of
SmolLM2-135M). That file alone does not tell how the time besides the search splits into the two terms: if all of it is
proportional to the size of the matrix (a; c), a larger model takes the least time, if none of it (b; d), the most. All
candidates of the default space are counted as this format. A task needs m x 4 (NK + N^2 + K^2) bytes, m the largest
value measured. Machines are filled task by task, the longest first, as long as cores and memory last; a core is assumed
to be as fast when its neighbours are busy. Calibration runs on one machine and takes

    T sum (8 NK + 4 K^2 + 2 N^2) flops         forward, replay, gradient of the inputs, H, H_guided, F, G

summed over the matrices, for T tokens, at the rate measured here for two cores times CORES / 2.
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

CACHED = ROOT / ".bench" / "cluster" / "shapes.json"
RESULTS = ROOT / "benchmarks" / "results" / "cluster_paper.json"
ENCODING = ROOT / "benchmarks" / "results" / "encoding.json"
FORMAT = "tq2-l12+ldl2+rot"
SHAPES = ((512, 512), (512, 2048), (2048, 512), (1024, 1024))
SMOLLM2 = llama(30, 576, 192, 1536)
PAPER = {"LLaMA-3-70B": llama(80, 8192, 1024, 28672), "LLaMA-3-405B": MODELS["LLaMA-3-405B"]}
MACHINES = (8, 64)
CORES, MEMORY_BYTES = 64, 1 << 40
"""The assumed machine: cores as fast as this one's, and 1 TiB of memory."""
TOKENS = 16 * 1024
PARTS = ("search", "next rate", "encoder")
COPIES, FLOPS_PER_S = 8.0, 30e9
"""Assumed for the bounds, not measured: m, and the rate at which a core calibrates."""


@dataclass(frozen=True)
class Scaling:
    """A model of the time and memory of encoding a matrix, with its largest error."""

    again: tuple[float, float]
    """The coefficients a and b, for every format."""
    once: tuple[float, float]
    """The coefficients c and d, once per matrix."""
    copies: float
    """The factor m of the memory."""
    worst: float
    """The largest relative error of a fitted time."""

    def seconds(self, rows: int, cols: int, formats: int) -> float:
        """Thread seconds of one task."""
        return formats * float(np.dot(self.again, _again(rows, cols))) + float(np.dot(self.once, _once(rows, cols)))

    def nbytes(self, rows: int, cols: int) -> float:
        """Peak memory of one task, in bytes."""
        return self.copies * 4 * (rows * cols + rows**2 + cols**2)


@dataclass(frozen=True)
class Estimate:
    """Estimated time of measuring one model on a number of machines."""

    model: str
    machines: int
    hours: float
    """Wall-clock time of encoding."""
    core_hours: float
    longest_hours: float
    """Time of the longest task."""
    calibration_hours: float


def _again(rows: float, cols: float) -> list[float]:
    return [rows * cols, rows * cols * (rows + cols)]


def _once(rows: float, cols: float) -> list[float]:
    return [rows**2 + cols**2, rows**3 + cols**3]


def time_shapes() -> dict[str, dict[str, float]]:
    """ "NxK" -> seconds of the first format ("first") and of a further one ("again"), and bytes; cached.

    Measured in a separate process.
    """
    if not CACHED.exists():
        command = [sys.executable, "-m", "benchmarks.cluster_paper", "time"]
        output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        write_text_atomic(CACHED, output.splitlines()[-1])
    return dict(json.loads(CACHED.read_text(encoding="utf-8")))


def _time_here(rows: int, cols: int) -> dict[str, float]:
    torch.manual_seed(0)
    X, Y = torch.randn(512, cols), torch.randn(512, rows)
    metric = Metric(X.T @ X / 512, torch.zeros(rows, cols), gram=Y.T @ Y / 512)
    W, fmt = torch.randn(rows, cols), Format.parse(FORMAT)
    inputs = 4 * (2 * rows * cols + rows**2 + cols**2)  # W, F, H and G, which a task also holds
    work, before, began = Workspace(metric), peak_rss_bytes(), time.thread_time()
    encode(W, fmt, work)
    between = time.thread_time()
    encode(W, fmt, work)
    seconds = {"first": between - began, "again": time.thread_time() - between}
    return {**seconds, "bytes": float(peak_rss_bytes() - before + inputs)}


def measured_scaling() -> Scaling:
    """The scaling fitted to SHAPES and encoding.json."""
    times = time_shapes()
    shapes = {(rows, cols): times[f"{rows}x{cols}"] for rows, cols in SHAPES}
    whole_model = {row["figure"]: row["ours"] for row in json.loads(ENCODING.read_text(encoding="utf-8"))}
    again = whole_model["next rate, all linears, 2 bits, 2^12 states"]
    once = whole_model["encoder, all linears, 2 bits, 2^12 states"] - again
    a, far_a = _fit(_again, [(f["again"], [s]) for s, f in shapes.items()] + [(again, _sizes(SMOLLM2))])
    c, far_c = _fit(_once, [(f["first"] - f["again"], [s]) for s, f in shapes.items()] + [(once, _sizes(SMOLLM2))])
    copies = max(f["bytes"] / (4 * (rows * cols + rows**2 + cols**2)) for (rows, cols), f in shapes.items())
    return Scaling(a, c, copies, max(far_a, far_c))


def bounds() -> dict[str, Scaling]:
    """The fastest and the slowest scaling that encoding.json allows, with COPIES for the memory."""
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
    """Least-squares coefficients of `terms`, none negative, for the measured (seconds, shapes), and the largest error.

    The terms are summed over the shapes; errors are relative.
    """
    A = np.array([np.sum([terms(*shape) for shape in shapes], axis=0) / seconds for seconds, shapes in measured])
    best, ones = np.zeros(2), np.ones(len(A))
    for columns in ([0, 1], [0], [1]):
        solution = np.linalg.lstsq(A[:, columns], ones, rcond=None)[0]
        if (solution >= 0).all():
            trial = np.zeros(2)
            trial[columns] = solution
            if not best.any() or np.square(A @ trial - 1).sum() < np.square(A @ best - 1).sum():
                best = trial
    return (float(best[0]), float(best[1])), float(np.abs(A @ best - 1).max())


def estimates(scaling: Scaling, calibration_flops_per_s: float) -> list[Estimate]:
    """Estimates for every model of PAPER and number of MACHINES; the calibration rate is that of one core."""
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
    """Floating-point operations of one calibration pass."""
    return float(tokens) * sum(8 * rows * cols + 4 * cols**2 + 2 * rows**2 for rows, cols in sizes)


def makespan(tasks: Iterable[tuple[float, float]], machines: int) -> float:
    """Seconds until all tasks (seconds, bytes) are done: the longest first, each where most memory is free."""
    cores, memory = [CORES] * machines, [float(MEMORY_BYTES)] * machines
    ends: list[tuple[float, int, float]] = []
    now = 0.0
    for seconds, nbytes in sorted(tasks, reverse=True):
        assert nbytes <= MEMORY_BYTES, f"a task of {nbytes / 2**30:.0f} GiB does not fit into any machine"
        while not (free := [i for i in range(machines) if cores[i] and memory[i] >= nbytes]):
            now, freed, returned = heapq.heappop(ends)
            cores[freed] += 1
            memory[freed] += returned
        chosen = max(free, key=memory.__getitem__)
        cores[chosen] -= 1
        memory[chosen] -= nbytes
        heapq.heappush(ends, (now + seconds, chosen, nbytes))
    return max((end for end, _, _ in ends), default=now)


def main() -> None:
    """Estimate with both bounds and with the fit, write and print."""
    scalings = {**bounds(), "fitted": measured_scaling()}
    rows = [
        {"scaling": name, **asdict(s), **asdict(e)} for name, s in scalings.items() for e in estimates(s, FLOPS_PER_S)
    ]
    write_text_atomic(RESULTS, canonical_json(rows))
    print(canonical_json(rows))


if __name__ == "__main__":
    if sys.argv[1:] == ["time"]:
        with one_thread():
            _time_here(64, 64)
            print(json.dumps({f"{rows}x{cols}": _time_here(rows, cols) for rows, cols in SHAPES}))
    else:
        main()
