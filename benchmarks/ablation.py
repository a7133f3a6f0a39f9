"""What each part contributes: one format everywhere with one part changed at a time, and the planner's mix.

    make bench NAME=ablation [MODEL=...] [TEXT=calibration] [TEST=held-out]

Run after NAME=quality; it adds to that benchmark's work folder. All but the last rows store about three bits per
weight. "ours" is the full method in one format everywhere, "other" the same without one part, so a ratio below one
shows what that part contributes. Then the planner's mix is compared at equal bytes, and for other costs to minimise.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console

from benchmarks.bench import (
    ROUNDING,
    Bench,
    Row,
    bench_from_environment,
    measure_formats,
    mixed,
    planned,
    report,
    row,
)
from benchmarks.peers import ROOT
from reallm.planner.results.uniform import uniform_plan
from reallm.planner.tables.measured_table import MeasuredTable
from reallm.planner.tables.plan import Cost

RESULTS = ROOT / "benchmarks" / "results" / "ablation.json"
FULL = "tq3-l12+ldl2+rot"
ABLATED = {
    "one-sided feedback": "tq3-l12+ldl+rot",
    "no feedback": "tq3-l12+rot",
    "no rotation": "tq3-l12+ldl2",
    "a smaller trellis": "tq3-l10+ldl2+rot",
    "scalar code": "lm3-g128-dq6x64+ldl",
}
OTHER_COSTS: tuple[Cost, ...] = ("guided", "fisher", "relative")
BUDGET = "2.5bpw"


def rows(bench: Bench, table: MeasuredTable) -> Iterator[Row]:
    """One row per ablated format, one for the mix against the uniform format, one per other cost to minimise."""
    uniform = uniform_plan(table, FULL, work=str(bench.work))
    full = planned(bench, f"uniform {FULL}", uniform)
    for part, fmt in ABLATED.items():
        yield row(full, planned(bench, f"{part}: {fmt}", uniform_plan(table, fmt, work=str(bench.work))))
    yield row(planned(bench, "reallm", mixed(bench, f"{uniform.bits_per_weight + ROUNDING:.9f}bpw")), full)
    best = planned(bench, "reallm", mixed(bench, BUDGET))
    for cost in OTHER_COSTS:
        yield row(best, planned(bench, f"planned by the {cost} cost", mixed(bench, BUDGET, cost)))


def main() -> None:
    """Measure what is missing, evaluate, write and print."""
    console = Console()
    bench = bench_from_environment(console)
    table = measure_formats(bench, "ablation", (FULL, *ABLATED.values()))
    report("ablation", rows(bench, table), RESULTS, console)


if __name__ == "__main__":
    main()
