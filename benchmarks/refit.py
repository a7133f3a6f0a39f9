"""Refit: a plan corrected by the measured loss of plans, compared with the plan as predicted at the same budget.

    make bench NAME=refit [MODEL=...] [TEXT=calibration] [HELD=held-out] [TEST=test]

Run after NAME=quality; it uses that benchmark's work folder. Corrections are found on WINDOWS windows of HELD, a
text used neither for calibration nor for evaluation. "ours" is the plan after refit and "other" the plan before it,
both measured on TEST as in NAME=quality. The rows on HELD are the figures that refit itself measured; they also compare
the plan with the best single format of the budget.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from rich.console import Console

from benchmarks.bench import Bench, Measured, Row, bench_from_environment, mixed, planned, report, row
from benchmarks.peers import ROOT
from reallm.planner.tables.plan import Plan
from reallm.planning.refit import refit

RESULTS = ROOT / "benchmarks" / "results" / "refit.json"
DEFAULT_HELD = "Salesforce/wikitext:wikitext-2-raw-v1:validation"
BUDGETS, ROUNDS, WINDOWS = (2.0, 3.0), 1, 4


def rows(bench: Bench, held: str) -> Iterator[Row]:
    """Three rows per budget."""
    for bits in BUDGETS:
        before = mixed(bench, f"{bits}bpw")
        after = refit(before, text=held, rounds=ROUNDS, windows=WINDOWS, model=bench.base)
        yield row(planned(bench, "reallm refit", after), planned(bench, "reallm", before))
        measured = after.measured
        assert measured is not None and measured.uniform_kl is not None and after.uniform is not None
        kls = {name: kl for name, _, kl in measured.tried}
        yield row(_held("reallm refit", after, measured.kl), _held("reallm, on the held-out text", before, kls["plan"]))
        yield row(
            _held("reallm refit", after, measured.kl),
            _held(f"uniform {after.uniform.format}", after, measured.uniform_kl),
        )


def _held(name: str, plan: Plan, kl: float) -> Measured:
    """A result that refit measured, which has no perplexity."""
    return Measured(name, plan.bits_per_weight, kl, float("nan"), {})


def main() -> None:
    """Plan, refit, evaluate, write and print."""
    console = Console()
    bench = bench_from_environment(console)
    report("refit", rows(bench, os.environ.get("HELD") or DEFAULT_HELD), RESULTS, console)


if __name__ == "__main__":
    main()
