"""What each part is worth: one format everywhere, one part changed at a time, and the planner's mix at the same bytes.

    make bench NAME=ablation [MODEL=...] [TEXT=calibration] [TEST=held-out]

After NAME=quality, whose measured folder it adds to. All but the last rows store about three bits a weight. "ours" is
the full method, uniform; "other" the same without one part, so a ratio under one says what the part is worth.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from rich.console import Console

from benchmarks.bench import NSAMPLES, ROUNDING, SEQLEN, Bench, Row, bench_from_environment, planned, report, row
from benchmarks.peers import ROOT
from reallm.measurement import measure
from reallm.planner.records import TABLE_FILE, MeasuredTable, read_record
from reallm.planner.uniform import uniform_plan
from reallm.planning import plan

RESULTS = ROOT / "benchmarks" / "results" / "ablation.json"
FULL = "tq3-l12+ldl2+rot"
ABLATED = {
    "one-sided feedback": "tq3-l12+ldl+rot",
    "no feedback": "tq3-l12+rot",
    "no rotation": "tq3-l12+ldl2",
    "a smaller trellis": "tq3-l10+ldl2+rot",
    "scalar code": "lm3-g128-dq6x64+ldl",
    "rank 8 for .25 bits": "tq2.75-l12+ldl2+rot+r8i8",
}
COSTS = ("two_sided", "guided", "fisher", "relative")
BUDGET = "2.5bpw"


def rows(bench: Bench) -> Iterator[Row]:
    """A row an ablated format, the mix against the uniform format, then a row a cost the planner could minimise."""
    table = read_record(bench.work / TABLE_FILE, MeasuredTable, "measure")
    uniform = uniform_plan(table, FULL, work=str(bench.work))
    full = planned(bench, f"uniform {FULL}", uniform)
    for part, fmt in ABLATED.items():
        yield row(full, planned(bench, f"{part}: {fmt}", uniform_plan(table, fmt, work=str(bench.work))))
    mix = plan(bench.work, budget=f"{uniform.bits_per_weight + ROUNDING:.9f}bpw")
    yield row(planned(bench, "reallm", mix), full)
    best = planned(bench, "reallm", plan(bench.work, budget=BUDGET))
    for cost in COSTS[1:]:
        yield row(best, planned(bench, f"planned by the {cost} cost", plan(bench.work, budget=BUDGET, cost=cost)))


def main() -> None:
    """Measure what is missing, evaluate, write and print."""
    console = Console()
    bench = bench_from_environment(console)
    space = bench.folder / "ablation.yaml"
    space.write_text(f"linear: [{', '.join((FULL, *ABLATED.values()))}]\n", encoding="utf-8")
    jobs = int(os.environ.get("JOBS") or -1)
    measure(
        bench.base_folder, text=bench.text, output=bench.work, space=space, nsamples=NSAMPLES, seqlen=SEQLEN, jobs=jobs
    )
    report("ablation", rows(bench), RESULTS, console)


if __name__ == "__main__":
    main()
