"""The planner's mix beside every preset, a published method each: one format everywhere, and the mix at fewer bytes.

    make bench NAME=presets [MODEL=...] [TEXT=calibration] [TEST=held-out]

After NAME=quality, whose measured folder it adds to. A preset's row is its own format nearest each of BITS bits; the
mix is planned at the largest of the targets' budgets that is no more.
"""

from __future__ import annotations

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
BITS = (2.2, 3.2)
"""Nearest to these, so that codes and the scales beside them are counted."""
BUDGETS = tuple(TARGETS)


def chosen_formats(preset: str, bench: Bench) -> list[str]:
    """The formats of `preset` that come nearest to BITS, on the model's own shapes."""
    inner = [m for m in bench.base.matrices if m.kind == "linear"]
    numel = sum(m.numel for m in inner)
    sizes = {
        name: 8 * sum(Format.parse(name).nbytes(m.rows, m.cols) for m in inner) / numel for name in PRESETS[preset][0]
    }
    nearest = {min(sizes, key=lambda name: abs(sizes[name] - bits)) for bits in BITS}
    return sorted((name for name in nearest if sizes[name] < 5), key=lambda name: sizes[name])


def rows(bench: Bench, table: MeasuredTable) -> Iterator[Row]:
    """A row a format of a preset."""
    for preset in (name for name in PRESETS if name not in OWN):
        for fmt in chosen_formats(preset, bench):
            uniform = uniform_plan(table, fmt, work=str(bench.work))
            budget = max(bits for bits in BUDGETS if bits <= uniform.bits_per_weight)
            yield row(
                planned(bench, "reallm", mixed(bench, f"{budget}bpw")), planned(bench, f"{preset} {fmt}", uniform)
            )


def main() -> None:
    """Measure what is missing, evaluate, write and print."""
    console = Console()
    bench = bench_from_environment(console)
    formats = sorted({fmt for preset in PRESETS if preset not in OWN for fmt in chosen_formats(preset, bench)})
    report("presets", rows(bench, measure_formats(bench, "presets", formats)), RESULTS, console)


if __name__ == "__main__":
    main()
