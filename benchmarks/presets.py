"""The planner's mix beside every preset, a published method each: one format everywhere, and the mix at fewer bytes.

    make bench NAME=presets [MODEL=...] [TEXT=calibration] [TEST=held-out] [PRESETS=gptq,qtip]

After NAME=quality, whose measured folder it adds to. A preset's row is its own format nearest BITS bits; the mix is
planned at the largest of the targets' budgets that is no more. PRESETS names some of them; all take over an hour.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from rich.console import Console

from benchmarks.bench import Bench, Row, bench_from_environment, measure_formats, mixed, planned, report, row
from benchmarks.peers import ROOT
from benchmarks.quality import TARGETS
from reallm.kernels.formats import Format
from reallm.planner.records import MeasuredTable
from reallm.planner.uniform import uniform_plan
from reallm.space import PRESETS

RESULTS = ROOT / "benchmarks" / "results" / "presets.json"
OWN = ("default", "quick", "scalar")
BITS = 3.2
"""Three bits and the scales beside them."""
BUDGETS = tuple(TARGETS)


def wanted_presets() -> list[str]:
    """The methods' presets, or those of them that the environment's PRESETS names."""
    named = os.environ.get("PRESETS")
    return [name for name in PRESETS if name not in OWN and (not named or name in named.split(","))]


def chosen_format(preset: str, bench: Bench) -> str:
    """The format of `preset` that comes nearest to BITS on the model's own shapes."""
    inner = [m for m in bench.base.matrices if m.kind == "linear"]
    numel = sum(m.numel for m in inner)

    def distance(name: str) -> float:
        return abs(8 * sum(Format.parse(name).nbytes(m.rows, m.cols) for m in inner) / numel - BITS)

    return min(PRESETS[preset][0], key=distance)


def rows(bench: Bench, table: MeasuredTable) -> Iterator[Row]:
    """A row a format of a preset."""
    for preset in wanted_presets():
        fmt = chosen_format(preset, bench)
        uniform = uniform_plan(table, fmt, work=str(bench.work))
        budget = max(bits for bits in BUDGETS if bits <= uniform.bits_per_weight)
        mix = planned(bench, "reallm", mixed(bench, f"{budget}bpw"))
        yield row(mix, planned(bench, f"{preset} {fmt}", uniform))


def main() -> None:
    """Measure what is missing, evaluate, write and print."""
    console = Console()
    bench = bench_from_environment(console)
    formats = sorted({chosen_format(preset, bench) for preset in wanted_presets()})
    report("presets", rows(bench, measure_formats(bench, "presets", formats)), RESULTS, console)


if __name__ == "__main__":
    main()
