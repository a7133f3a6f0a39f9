"""The order of work: each block calibrated on the dense model's inputs, or on those that compressed blocks give it.

    make bench NAME=sequential [MODEL=...] [TEXT=calibration] [TEST=held-out]

After NAME=quality, whose measured folder it uses. One format everywhere: "other" is measured on the dense model (the
default), "ours" with `measure --prefix` on an artifact of the very same format. Same bytes, same text, same windows.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console

from benchmarks.bench import (
    NSAMPLES,
    SEQLEN,
    Bench,
    Row,
    bench_from_environment,
    measure_formats,
    planned,
    report,
    row,
)
from benchmarks.peers import ROOT
from reallm.compilation.compile import compile_plan
from reallm.measurement.measure import measure
from reallm.planner.results.uniform import uniform_plan
from reallm.planner.tables.records import write_record

RESULTS = ROOT / "benchmarks" / "results" / "sequential.json"
FORMATS = ("tq2-l12+ldl2+rot",)


def rows(bench: Bench) -> Iterator[Row]:
    """A row a format."""
    table = measure_formats(bench, "sequential", FORMATS)
    for fmt in FORMATS:
        dense = uniform_plan(table, fmt, work=str(bench.work))
        plan_path, prefix = bench.folder / "prefix.json", bench.folder / f"prefix-{fmt}"
        if not prefix.exists():
            write_record(plan_path, dense)
            compile_plan(plan_path, prefix, model=bench.base, kernels=False)
        work = bench.folder / f"sequential-{fmt}"
        space = bench.folder / "sequential.yaml"
        space.write_text(f"linear: [{fmt}]\n", encoding="utf-8")
        again = measure(
            bench.base_folder,
            text=bench.text,
            output=work,
            space=space,
            nsamples=NSAMPLES,
            seqlen=SEQLEN,
            prefix=prefix,
        )
        sequential = planned(bench, f"sequential {fmt}", uniform_plan(again, fmt, work=str(work)))
        yield row(sequential, planned(bench, f"uniform {fmt}", dense))


def main() -> None:
    """Measure what is missing, evaluate, write and print."""
    console = Console()
    report("sequential", rows(bench_from_environment(console)), RESULTS, console)


if __name__ == "__main__":
    main()
