"""Which cost predicts the measured loss: rank correlations over single-matrix changes of the model.

    make bench NAME=proxies [MODEL=...] [TEXT=calibration] [TEST=held-out] [CHANGES=140]

After NAME=quality, whose measured folder it uses. Each change stores one matrix in one format and leaves the rest as it
is; its KL to the dense model is measured on WINDOWS windows. "ours" is 1 minus the rank correlation (Spearman 1904) of
KL with the default cost, "peer" that of another cost, so lower is better. CHANGES takes that many, evenly spread.
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
from tqdm import tqdm

from benchmarks.bench import Bench, Figure, bench_from_environment, machine
from benchmarks.peers import ROOT
from reallm.cli.tables import columns_table
from reallm.kernels.storage.atomic import canonical_json, write_text_atomic
from reallm.planner.results.uniform import uniform_plan
from reallm.planner.tables.measured_table import TABLE_FILE, MeasuredTable
from reallm.planner.tables.plan import Choice
from reallm.planner.tables.records import read_record
from reallm.planning.refit import PlanEvaluator

RESULTS = ROOT / "benchmarks" / "results" / "proxies.json"
FORMATS = ("tq1.5-l12+ldl2+rot", "tq2.25-l12+ldl2+rot", "tq3-l12+ldl2+rot", "lm4-g64-dq6x64+ldl")
BLOCKS, WINDOWS = 5, 2
"""Blocks evenly spread over the depth, all matrices of each."""
OURS = "two_sided"
COSTS = ("frobenius", "relative", "plain H", "fisher", "guided", OURS)


@dataclass(frozen=True)
class Row(Figure):
    """One cost beside the default."""

    median_measured_over_predicted: float
    changes: int


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Rank correlation of two lists without ties."""
    ranks = [np.argsort(np.argsort(np.asarray(values))) for values in (a, b)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def changes(bench: Bench, table: MeasuredTable) -> list[Choice]:
    """The single-matrix changes, of all formats and matrices of the chosen blocks, or CHANGES of them."""
    last = max(m.block for m in bench.base.matrices if m.block is not None)
    blocks = {round(i * last / (BLOCKS - 1)) for i in range(BLOCKS)}
    names = {m.name for m in bench.base.matrices if m.kind == "linear" and m.block in blocks}
    plans = [uniform_plan(table, fmt, work=str(bench.work)) for fmt in FORMATS]
    every = [choice for plan in plans for choice in plan.choices if choice.matrix in names]
    most = int(os.environ.get("CHANGES") or len(every))
    return [every[i] for i in np.linspace(0, len(every) - 1, min(most, len(every))).round().astype(int)]


@torch.no_grad()
def second_moments(bench: Bench, names: set[str]) -> dict[str, torch.Tensor]:
    """H = x^T x [cols, cols] of the inputs of the linears called `names`, over the calibration windows."""
    found: dict[str, torch.Tensor] = {}

    def hook(name: str, module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        x = arguments[0].float().flatten(0, -2)
        found[name] = found.get(name, torch.zeros(())) + x.T @ x

    model = bench.dense.model
    hooks = [model.get_submodule(name).register_forward_pre_hook(partial(hook, name)) for name in names]
    for window in load_file(bench.calibration)["windows"]:
        model(input_ids=window[None])
    for each in hooks:
        each.remove()
    return found


def measured(bench: Bench, table: MeasuredTable) -> tuple[list[float], dict[str, list[float]]]:
    """(KL of every change, cost name -> its value for every change)."""
    plan = uniform_plan(table, FORMATS[0], work=str(bench.work))
    memory = PlanEvaluator(bench.base, bench.work, bench.windows[:WINDOWS], progress=False)
    records = {(r.matrix, r.format): r for r in table.measurements}
    kls, costs = [], {name: list[float]() for name in COSTS}
    chosen = changes(bench, table)
    moments = second_moments(bench, {choice.matrix for choice in chosen})
    for choice in tqdm(chosen, desc="change", unit="matrix"):
        matrix, record = memory.matrices[choice.matrix], records[choice.matrix, choice.format]
        kls.append(memory.loss(plan.model_copy(update={"choices": (choice,)})))
        parameter = memory.model.get_parameter(matrix.parameter).detach()
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
