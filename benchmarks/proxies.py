"""Which cost predicts the measured loss best: rank correlations over single-matrix changes of the model.

    make bench NAME=proxies [MODEL=...] [TEXT=calibration] [TEST=held-out] [CHANGES=140]

Run after NAME=quality; it uses that benchmark's work folder. Each change stores one matrix in one format and leaves
the rest as it is; its KL to the dense model is measured on WINDOWS windows. "ours" is 1 minus the rank correlation
(Spearman 1904) of KL with the default cost, "peer" the same for another cost, so lower is better. CHANGES limits the
number of changes, which are then spread evenly.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version

import numpy as np
import torch
from numpy.typing import ArrayLike
from rich.console import Console
from safetensors.torch import load_file

from benchmarks.bench import Bench, Figure, bench_from_environment, machine
from benchmarks.peers import ROOT
from reallm.cli.tables import columns_table
from reallm.kernels.storage.atomic import canonical_json, write_text_atomic
from reallm.planner.results.uniform import uniform_plan
from reallm.planner.tables.measured_table import TABLE_FILE, MeasuredTable
from reallm.planner.tables.plan import Choice
from reallm.planner.tables.records import read_record
from reallm.planning.plan_evaluator import PlanEvaluator
from reallm.system.progress import progress_bar

RESULTS = ROOT / "benchmarks" / "results" / "proxies.json"
FORMATS = ("tq1.5-l12+ldl2+rot", "tq2.25-l12+ldl2+rot", "tq3-l12+ldl2+rot", "lm4-g64-dq6x64+ldl")
BLOCKS, WINDOWS = 5, 2
"""Number of blocks, spread evenly over the depth, of which all matrices are changed; and of windows."""
OURS = "two_sided"
COSTS = ("frobenius", "relative", "plain H", "fisher", "guided", OURS)


@dataclass(frozen=True)
class Row(Figure):
    """The default cost beside another one."""

    median_measured_over_predicted: float
    changes: int


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation of two lists without ties."""
    ranks = [np.argsort(np.argsort(np.asarray(values))) for values in (a, b)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def changes(bench: Bench, table: MeasuredTable) -> list[Choice]:
    """All single-matrix changes in FORMATS and the chosen blocks, or CHANGES of them."""
    last = max(m.block for m in bench.base.matrices if m.block is not None)
    blocks = {round(i * last / (BLOCKS - 1)) for i in range(BLOCKS)}
    names = {m.name for m in bench.base.matrices if m.kind == "linear" and m.block in blocks}
    plans = [uniform_plan(table, fmt, work=str(bench.work)) for fmt in FORMATS]
    candidates = [choice for plan in plans for choice in plan.choices if choice.matrix in names]
    count = min(int(os.environ.get("CHANGES") or len(candidates)), len(candidates))
    return [candidates[i] for i in np.linspace(0, len(candidates) - 1, count).round().astype(int)]


@torch.no_grad()
def second_moments(bench: Bench, names: set[str]) -> dict[str, torch.Tensor]:
    """H = x^T x [cols, cols] of the inputs of the linears called `names`, over the calibration windows."""
    moments: dict[str, torch.Tensor] = {}

    def hook(name: str, module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        x = arguments[0].float().flatten(0, -2)
        moments[name] = moments.get(name, torch.zeros(())) + x.T @ x

    model = bench.dense.model
    hooks = [model.get_submodule(name).register_forward_pre_hook(partial(hook, name)) for name in names]
    for window in load_file(bench.calibration)["windows"]:
        model(input_ids=window[None])
    for handle in hooks:
        handle.remove()
    return moments


def measured(bench: Bench, table: MeasuredTable) -> tuple[list[float], dict[str, list[float]]]:
    """(KL of every change, cost name -> its value for every change)."""
    plan = uniform_plan(table, FORMATS[0], work=str(bench.work))
    evaluator = PlanEvaluator(bench.base, bench.work, bench.windows[:WINDOWS], progress=False)
    records = {(r.matrix, r.format): r for r in table.measurements}
    kls, costs = [], {name: list[float]() for name in COSTS}
    chosen = changes(bench, table)
    moments = second_moments(bench, {choice.matrix for choice in chosen})
    for choice in progress_bar(chosen, desc="change", unit="matrix"):
        matrix, record = evaluator.matrices[choice.matrix], records[choice.matrix, choice.format]
        kls.append(evaluator.loss(plan.model_copy(update={"choices": (choice,)})))
        parameter = evaluator.model.get_parameter(matrix.parameter).detach()
        error = bench.base.weight(matrix) - (parameter.T if matrix.transposed else parameter)
        costs["frobenius"].append(float(error.square().sum()))
        costs["plain H"].append(float(((error @ moments[choice.matrix]) * error).sum(dtype=torch.float64)))
        for name in ("relative", "fisher", "guided", OURS):
            costs[name].append(getattr(record, name))
    return kls, costs


def main() -> None:
    """Measure, write and print."""
    console = Console()
    bench = bench_from_environment(console)
    table = read_record(bench.work / TABLE_FILE, MeasuredTable, "measure")
    kls, costs = measured(bench, table)
    correlation = {name: spearman(values, kls) for name, values in costs.items()}
    versions, rows = {name: version(name) for name in ("reallm", "torch")}, []
    for name, values in costs.items():
        ours, theirs = 1 - correlation[OURS], 1 - correlation[name]
        ratio = float(np.median(np.array(kls) / np.array(values)))
        figure = f"1 - rank correlation with KL, {OURS} and {name}"
        rows.append(Row(figure, "", ours, name, theirs, ours / theirs, versions, machine(), ratio, len(kls)))
    write_text_atomic(RESULTS, canonical_json([asdict(row) for row in rows]))
    lines = [[r.peer_name, f"{1 - r.peer:.3f}", f"{r.median_measured_over_predicted:.3g}"] for r in rows]
    headings = ("cost", "rank correlation", "median KL / cost")
    console.print(columns_table(f"{len(kls)} single-matrix changes", headings, lines))


if __name__ == "__main__":
    main()
