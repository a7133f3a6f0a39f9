"""The planner's exact core beside CBC and HiGHS through PuLP, as ModelOpt and LQ-LoRA solve it, and a sweep.

    make bench NAME=planner

Instances shaped like large models with measured costs (planner_instances.py), three budgets each; then LLaMA-2-7B's
with few formats, and with a codebook of 1 MiB for every role and twentieth rate, which takes a tenth off the costs of
those who use it. Seconds are of processor time. The peers run in a process of their own, for LIMIT_S seconds of wall
time at the most, and get the programme of `planner/ilp.py`: one binary a candidate, zero gap. Their seconds include
building it in PuLP. "peer" is null where no answer came.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from typing import Literal

import numpy as np
import pulp
from rich.console import Console

from benchmarks.bench import Figure, machine
from benchmarks.peers import ROOT
from benchmarks.planner_instances import MODELS, instance
from reallm.cli.tables import columns_table
from reallm.kernels.storage.atomic import canonical_json, write_text_atomic
from reallm.planner.problem.problem import Candidate, Item, Problem
from reallm.planner.solvers.ilp import build
from reallm.planner.solvers.knapsack import solve_knapsack
from reallm.planner.solvers.solve import optimise_all

RESULTS = ROOT / "benchmarks" / "results" / "planner.json"
BUDGETS, SEEDS = (2.0, 3.0, 4.0), (0, 1, 2)
TARGETS = {"LLaMA-2-7B": 0.1, "LLaMA-3-405B": 0.5, "DeepSeek-V3": 20.0}
LIMIT_S = 120.0
Kind = Literal["one budget", "at most 3 formats", "35 shared codebooks"]
PLAIN: Kind = "one budget"
FORMATS: Kind = "at most 3 formats"
CODEBOOKS: Kind = "35 shared codebooks"
FEW, BOOK_EVERY, BOOK_GAIN = 3, 20, 0.9
PEER_ITEMS = 1000
"""Larger programmes (4.5 million binaries) are not given to PuLP: it alone would need more memory than this machine."""
SWEEP, SWEPT = 100, "LLaMA-3-405B"


@dataclass(frozen=True)
class Row(Figure):
    """A figure, and how the solvers ended."""

    note: str


def as_problem(model: str, seed: int, bits: float, kind: Kind) -> Problem:
    """The same instance for PuLP and for the search."""
    found, numel = instance(model, seed)
    roles = [role for shapes in MODELS[model] for role, _, _ in shapes]
    shared = {f"{role}{n}": 1 << 20 for role in set(roles) for n in range(0, found.cost.shape[1], BOOK_EVERY)}
    items = []
    for i, row in enumerate(zip(found.cost, found.nbytes, strict=True)):
        candidates = []
        for n, (cost, nbytes) in enumerate(zip(*row, strict=True)):
            book = (f"{roles[i]}{n}",) if kind == CODEBOOKS and n % BOOK_EVERY == 0 else ()
            candidates.append(Candidate(int(nbytes), float(cost) * (BOOK_GAIN if book else 1.0), str(n), book))
        items.append(Item(f"m{i}", tuple(candidates)))
    few = FEW if kind == FORMATS else None
    return Problem(tuple(items), shared if kind == CODEBOOKS else {}, int(bits * numel / 8), (), few)


def peer_worker(name: str, model: str, seed: int, bits: float, kind: Kind, answer: Connection) -> None:
    """Solve in a process of its own; sends (seconds, status, cost)."""
    problem = as_problem(model, seed, bits, kind)
    total = sum(c.cost for item in problem.items for c in item.candidates)
    began = time.process_time()
    programme, x = build(problem, scale=1e4 * len(problem.items) / total)
    options = {"msg": False, "gapRel": 0.0, "timeLimit": LIMIT_S, "threads": 1}
    programme.solve(pulp.HiGHS(**options) if name == "HiGHS" else pulp.PULP_CBC_CMD(**options))
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(u.ru_utime + u.ru_stime for u in usage) - began
    if programme.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        answer.send((seconds, "no answer", None))
        return
    picks = [max(range(len(row)), key=lambda c: row[c].varValue or 0.0) for row in x]
    cost = problem.cost([item.candidates[p] for item, p in zip(problem.items, picks, strict=True)])
    answer.send((seconds, "optimal" if programme.sol_status == pulp.LpSolutionOptimal else "cut short", cost))


def run_peer(
    name: str, model: str, seed: int, bits: float, kind: Kind = PLAIN
) -> tuple[float | None, str, float | None]:
    """(seconds, how it ended, cost)."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    arguments = (name, model, seed, bits, kind, sender)
    process = multiprocessing.get_context("spawn").Process(target=peer_worker, args=arguments)
    process.start()
    result = receiver.recv() if receiver.poll(LIMIT_S + 60) else (None, f"no answer in {LIMIT_S + 60:.0f} s", None)
    process.kill()
    process.join()
    return result


def rows() -> Iterator[Row]:
    """A row a model and peer, then the sweep."""
    versions = {name: version(name) for name in ("reallm", "numpy", "pulp", "highspy")}
    for model, target in TARGETS.items():
        seconds, costs, proved = [], {}, 0
        for seed in SEEDS:
            found, numel = instance(model, seed)
            for bits in BUDGETS:
                began = time.process_time()
                answer = solve_knapsack(found, int(bits * numel / 8))
                seconds.append(time.process_time() - began)
                assert answer is not None
                proved += answer.optimal
                costs[seed, bits] = found.total(answer.picks[0])[0]
        median, worst = statistics.median(seconds), max(seconds)
        shape = f"{len(found.cost)} matrices x {found.cost.shape[1]}"
        note = f"{proved} of {len(seconds)} proved optimal, worst {worst:.3f} s"
        figure = f"{model}, {shape}"
        yield Row(
            figure, "s", median, "target", target, worst / target, versions, machine(), f"{note}; ratio of the worst"
        )
        for name in ("HiGHS", "CBC") if len(found.cost) <= PEER_ITEMS else ():
            theirs, how, cost = run_peer(name, model, SEEDS[0], BUDGETS[1])
            ours = seconds[1]
            gap = "" if cost is None else f", its cost {cost / costs[SEEDS[0], BUDGETS[1]] - 1:+.2g} of ours"
            ratio = None if theirs is None else ours / theirs
            yield Row(
                f"{figure}, {BUDGETS[1]:g} bits",
                "s",
                ours,
                f"PuLP {name}",
                theirs,
                ratio,
                versions,
                machine(),
                how + gap,
            )
    yield from _harder(versions)
    found, numel = instance(SWEPT)
    began = time.process_time()
    answers = [solve_knapsack(found, int(bits * numel / 8)) for bits in np.linspace(2, 6, SWEEP)]
    seconds_all = time.process_time() - began
    proved = sum(answer is not None and answer.optimal for answer in answers)
    note = f"{proved} of {SWEEP} proved optimal"
    yield Row(
        f"sweep of {SWEEP} budgets, {SWEPT}",
        "s",
        seconds_all,
        "target",
        60.0,
        seconds_all / 60,
        versions,
        machine(),
        note,
    )


def _harder(versions: dict[str, str]) -> Iterator[Row]:
    """Few formats and shared codebooks, beside HiGHS."""
    model, seed, bits = "LLaMA-2-7B", SEEDS[0], 2.5
    for kind in (FORMATS, CODEBOOKS):
        problem = as_problem(model, seed, bits, kind)
        began = time.process_time()
        (ours,) = optimise_all(problem, 1, LIMIT_S)
        seconds = time.process_time() - began
        assert ours is not None
        theirs, how, cost = run_peer("HiGHS", model, seed, bits, kind)
        gap = "" if cost is None else f", its cost {cost / problem.cost(ours.chosen) - 1:+.2g} of ours"
        ratio = None if theirs is None else seconds / theirs
        note = f"ours {'proved optimal' if ours.finished else 'cut short'}; {how}{gap}"
        yield Row(
            f"{model}, {kind}, {bits:g} bits", "s", seconds, "PuLP HiGHS", theirs, ratio, versions, machine(), note
        )


def main() -> None:
    """Run all, write and print."""
    done = []
    for each in rows():
        done.append(each)
        write_text_atomic(RESULTS, canonical_json([asdict(row) for row in done]))
    numbers = [(f"{r.ours:.3f}", *("-" if v is None else f"{v:.4g}" for v in (r.peer, r.ratio))) for r in done]
    lines = [[r.figure, n[0], r.peer_name, n[1], n[2], r.note] for r, n in zip(done, numbers, strict=True)]
    headings = ("figure", "our s", "beside", "its s", "ratio", "note")
    Console(width=200).print(columns_table(f"planner on {machine()}", headings, lines))


if __name__ == "__main__":
    main()
