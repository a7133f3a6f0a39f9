"""The planner's exact solver compared with CBC and HiGHS through PuLP, which ModelOpt and LQ-LoRA use; and a sweep.

    make bench NAME=planner

The instances are shaped like large models, with measured costs (planner_instances.py), at three budgets each. Then
LLaMA-2-7B with few formats, and with a codebook of 1 MiB for every role and twentieth rate, which reduces the cost of
the candidates that use it by a tenth. All times are processor time. The peers run in a separate process for at most
LIMIT_S seconds of wall time and solve the integer program of the planner's `solvers/ilp.py`: one binary variable per
candidate, zero gap. Their times include building it in PuLP. "peer" is null where there was no answer in time.
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
from reallm.planner.solvers.solve import cheapest_solutions

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
"""Problems with more matrices are not given to PuLP: with 4.5 million binaries it alone would exhaust the memory."""
SWEEP, SWEPT = 100, "LLaMA-3-405B"


@dataclass(frozen=True)
class Row(Figure):
    """A figure, with a note on how the solvers ended."""

    note: str


def as_problem(model: str, seed: int, bits: float, kind: Kind) -> Problem:
    """The instance as the problem that both PuLP and our solver get."""
    inputs, numel = instance(model, seed)
    roles = [role for shapes in MODELS[model] for role, _, _ in shapes]
    shared = {f"{role}{n}": 1 << 20 for role in set(roles) for n in range(0, inputs.cost.shape[1], BOOK_EVERY)}
    items = []
    for i, row in enumerate(zip(inputs.cost, inputs.nbytes, strict=True)):
        candidates = []
        for n, (cost, nbytes) in enumerate(zip(*row, strict=True)):
            book = (f"{roles[i]}{n}",) if kind == CODEBOOKS and n % BOOK_EVERY == 0 else ()
            candidates.append(Candidate(int(nbytes), float(cost) * (BOOK_GAIN if book else 1.0), str(n), book))
        items.append(Item(f"m{i}", tuple(candidates)))
    max_formats = FEW if kind == FORMATS else None
    return Problem(tuple(items), shared if kind == CODEBOOKS else {}, int(bits * numel / 8), (), max_formats)


def peer_worker(name: str, model: str, seed: int, bits: float, kind: Kind, answer: Connection) -> None:
    """Solve with a peer, in a separate process; sends (seconds, status, cost) to `answer`."""
    problem = as_problem(model, seed, bits, kind)
    total = sum(c.cost for item in problem.items for c in item.candidates)
    began = time.process_time()
    program, x = build(problem, scale=1e4 * len(problem.items) / total)
    options = {"msg": False, "gapRel": 0.0, "timeLimit": LIMIT_S, "threads": 1}
    program.solve(pulp.HiGHS(**options) if name == "HiGHS" else pulp.PULP_CBC_CMD(**options))
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(u.ru_utime + u.ru_stime for u in usage) - began
    if program.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        answer.send((seconds, "no answer", None))
        return
    picks = [max(range(len(row)), key=lambda c: row[c].varValue or 0.0) for row in x]
    cost = problem.cost([item.candidates[p] for item, p in zip(problem.items, picks, strict=True)])
    answer.send((seconds, "optimal" if program.sol_status == pulp.LpSolutionOptimal else "cut short", cost))


def run_peer(
    name: str, model: str, seed: int, bits: float, kind: Kind = PLAIN
) -> tuple[float | None, str, float | None]:
    """(seconds, status, cost) of a peer; seconds and cost are None where there was no answer."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    arguments = (name, model, seed, bits, kind, sender)
    process = multiprocessing.get_context("spawn").Process(target=peer_worker, args=arguments)
    process.start()
    result = receiver.recv() if receiver.poll(LIMIT_S + 60) else (None, f"no answer in {LIMIT_S + 60:.0f} s", None)
    process.kill()
    process.join()
    return result


def rows() -> Iterator[Row]:
    """One row per model and peer, then the rows of the harder problems and of the sweep."""
    versions = {name: version(name) for name in ("reallm", "numpy", "pulp", "highspy")}
    for model, target in TARGETS.items():
        seconds, costs, proved = [], {}, 0
        for seed in SEEDS:
            inputs, numel = instance(model, seed)
            for bits in BUDGETS:
                began = time.process_time()
                answer = solve_knapsack(inputs, int(bits * numel / 8))
                seconds.append(time.process_time() - began)
                assert answer is not None
                proved += answer.optimal
                costs[seed, bits] = inputs.total(answer.picks[0])[0]
        median, worst = statistics.median(seconds), max(seconds)
        shape = f"{len(inputs.cost)} matrices x {inputs.cost.shape[1]}"
        note = f"{proved} of {len(seconds)} proved optimal, worst {worst:.3f} s"
        figure = f"{model}, {shape}"
        yield Row(
            figure, "s", median, "target", target, worst / target, versions, machine(), f"{note}; ratio of the worst"
        )
        for name in ("HiGHS", "CBC") if len(inputs.cost) <= PEER_ITEMS else ():
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
    inputs, numel = instance(SWEPT)
    began = time.process_time()
    answers = [solve_knapsack(inputs, int(bits * numel / 8)) for bits in np.linspace(2, 6, SWEEP)]
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
    """Rows with few formats and with shared codebooks, beside HiGHS."""
    model, seed, bits = "LLaMA-2-7B", SEEDS[0], 2.5
    for kind in (FORMATS, CODEBOOKS):
        problem = as_problem(model, seed, bits, kind)
        began = time.process_time()
        (ours,) = cheapest_solutions(problem, 1, LIMIT_S)
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
    for new in rows():
        done.append(new)
        write_text_atomic(RESULTS, canonical_json([asdict(row) for row in done]))
    numbers = [(f"{r.ours:.3f}", *("-" if v is None else f"{v:.4g}" for v in (r.peer, r.ratio))) for r in done]
    lines = [[r.figure, n[0], r.peer_name, n[1], n[2], r.note] for r, n in zip(done, numbers, strict=True)]
    headings = ("figure", "our s", "beside", "its s", "ratio", "note")
    Console(width=200).print(columns_table(f"planner on {machine()}", headings, lines))


if __name__ == "__main__":
    main()
