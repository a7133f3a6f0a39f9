"""The presets, a published method each, beside their own packages from PyPI and beside the planner's mix.

    make bench NAME=presets [MODEL=...] [TEXT=calibration] [TEST=held-out] [PRESETS=gptq,qtip] [PEERS=GPTQ]

After NAME=quality, whose measured folder it adds to. A preset is shown by one format everywhere, at about three bits
(four where its package knows no other); those that have formats near two and four bits by these as well. First the
preset ("ours") beside its package at the same codes and group; then the planner's mix ("ours") beside the preset, at
the largest of the targets' budgets that is no more than the preset's bytes. PRESETS names some of the presets or of
their formats, whose rows join those of the earlier run; all take hours.
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
"""Of the others PyPI has no quantiser: aqlm, vptq and spqr_quant only run what was made elsewhere."""
BUDGETS = tuple(TARGETS)


def wanted() -> list[tuple[str, str]]:
    """(preset, format) of SHOWN, or those of them whose preset or format the environment's PRESETS names."""
    named = [name for name in os.environ.get("PRESETS", "").split(",") if name]
    shown = [(preset, fmt) for preset, formats in SHOWN.items() for fmt in formats]
    assert all(fmt in PRESETS[preset][0] for preset, fmt in shown)
    return [pair for pair in shown if not named or set(pair) & set(named)]


def rows(bench: Bench, table: MeasuredTable) -> Iterator[Row]:
    """One or two rows a format."""
    for preset, fmt in wanted():
        uniform = uniform_plan(table, fmt, work=str(bench.work))
        found = planned(bench, f"{preset} {fmt}", uniform)
        if fmt == SHOWN[preset][0] and OWN_PEERS.get(preset) in wanted_peers():
            yield row(found, bench.peer(OWN_PEERS[preset]))
        budget = max(bits for bits in BUDGETS if bits <= uniform.bits_per_weight)
        yield row(planned(bench, "reallm", mixed(bench, f"{budget}bpw")), found)


def main() -> None:
    """Measure what is missing, evaluate, write and print."""
    console = Console()
    bench = bench_from_environment(console)
    formats = [fmt for _, fmt in wanted()]
    found = rows(bench, measure_formats(bench, "presets", formats))
    report("presets", found, RESULTS, console, keep=bool(os.environ.get("PRESETS")))


if __name__ == "__main__":
    main()
