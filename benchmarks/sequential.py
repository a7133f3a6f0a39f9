"""Calibrating each block on the dense model's inputs, compared with the inputs that the compressed blocks give it.

    make bench NAME=sequential [MODEL=...] [TEXT=calibration] [TEST=held-out]

Run after NAME=quality; it uses that benchmark's work folder. One format everywhere: "other" is measured on the
dense model (the default), "ours" with `measure --prefix` on an artifact in the same format. Bytes, text and windows are
equal.
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
    """One row per format."""
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
        prefixed = measure(
            bench.base_folder,
            text=bench.text,
            output=work,
            space=space,
            nsamples=NSAMPLES,
            seqlen=SEQLEN,
            prefix=prefix,
        )
        sequential = planned(bench, f"sequential {fmt}", uniform_plan(prefixed, fmt, work=str(work)))
        yield row(sequential, planned(bench, f"uniform {fmt}", dense))


def main() -> None:
    """Measure what is missing, evaluate, write and print."""
    console = Console()
    report("sequential", rows(bench_from_environment(console)), RESULTS, console)


if __name__ == "__main__":
    main()
