"""The presets, each a published method, compared with the methods' own packages and with the planner's mix.

    make bench NAME=presets [MODEL=...] [TEXT=calibration] [TEST=held-out] [PRESETS=gptq,qtip] [PEERS=GPTQ]

Run after NAME=quality; it adds to that benchmark's work folder. A preset is represented by one format everywhere at
about three bits (four where its package supports nothing else), and by formats near two and four bits where it has
them. First the preset ("ours") is compared with its package at the same codes and group size; then the planner's mix
("ours") with the preset, at the largest of the targets' budgets that does not exceed the preset's bytes. PRESETS
selects presets or formats; the other rows of an earlier run stay. The full run takes hours.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from rich.console import Console

from benchmarks.bench import Bench, Row, bench_from_environment, measure_formats, mixed, planned, report, row
from benchmarks.peers import ROOT, Peer, wanted_peers
from benchmarks.quality import TARGETS
from reallm.measurement.search_space import PRESETS
from reallm.planner.results.uniform import uniform_plan
from reallm.planner.tables.measured_table import MeasuredTable

RESULTS = ROOT / "benchmarks" / "results" / "presets.json"
SHOWN: dict[str, tuple[str, ...]] = {
    "qlora": ("nf4-g64-dq8x256",),
    "loftq": ("nf4-g64-dq8x256+svd+r16",),
    "gptq": ("uint3-g64+ldl", "uint2-g64+ldl", "uint4-g64+ldl"),
    "awq": ("uint3-g64+cs", "uint4-g64+cs"),
    "omniquant": ("uint3-g64+lwc", "uint4-g64+lwc"),
    "squeezellm": ("km3+o5", "km2+o5", "km4+o5"),
    "spqr": ("uint3-g16-dq4x16+ldl", "uint2-g16-dq4x16+ldl", "uint4-g16-dq4x16+ldl"),
    "qtip": ("tq3-l12+ldl+rot", "tq2-l12+ldl+rot", "tq4-l12+ldl+rot"),
    "quip#": ("e8p3+ldl+rot", "e8p2+ldl+rot", "e8p4+ldl+rot"),
    "lq-lora": ("nf3-g64-dq8x256+r32",),
    "reallm": ("nd1x6-d2-c32x1-t2-w8+ldl+rot",),
    "aqlm": ("aq3x8-d8", "aq2x8-d8", "aq4x8-d8"),
}
OWN_PEERS = {
    "qlora": Peer("NF4", 4, 64),
    "loftq": Peer("LoftQ", 4, 64),
    "gptq": Peer("GPTQ", 3, 64),
    "awq": Peer("AWQ", 3, 64),
}
"""PyPI has no quantiser for the others: aqlm, vptq and spqr_quant only run models that were quantised elsewhere."""
BUDGETS = tuple(TARGETS)


def wanted() -> list[tuple[str, str]]:
    """(preset, format) of SHOWN, or only those whose preset or format is in the environment variable PRESETS."""
    named = [name for name in os.environ.get("PRESETS", "").split(",") if name]
    shown = [(preset, fmt) for preset, formats in SHOWN.items() for fmt in formats]
    assert all(fmt in PRESETS[preset][0] for preset, fmt in shown)
    return [pair for pair in shown if not named or set(pair) & set(named)]


def rows(bench: Bench, table: MeasuredTable) -> Iterator[Row]:
    """One or two rows per format."""
    for preset, fmt in wanted():
        uniform = uniform_plan(table, fmt, work=str(bench.work))
        result = planned(bench, f"{preset} {fmt}", uniform)
        if fmt == SHOWN[preset][0] and OWN_PEERS.get(preset) in wanted_peers():
            yield row(result, bench.peer(OWN_PEERS[preset]))
        budget = max(bits for bits in BUDGETS if bits <= uniform.bits_per_weight)
        yield row(planned(bench, "reallm", mixed(bench, f"{budget}bpw")), result)


def main() -> None:
    """Measure what is missing, evaluate, write and print."""
    console = Console()
    bench = bench_from_environment(console)
    formats = [fmt for _, fmt in wanted()]
    table = measure_formats(bench, "presets", formats)
    report("presets", rows(bench, table), RESULTS, console, keep=bool(os.environ.get("PRESETS")))


if __name__ == "__main__":
    main()
