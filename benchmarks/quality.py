"""Quality at equal bytes: reallm compared with its targets and with the methods of benchmarks/peers.py.

    make bench NAME=quality [MODEL=...] [TEXT=calibration] [TEST=held-out] [SPACE=...] [JOBS=2] [PEERS=HQQ,NF4,GPTQ]

All methods that calibrate use the same calibration tokens. Bits per weight count every byte of ours, with padding, and
the codes, scales and zeros of the peers. Ours is the planner's mix at the peer's bits per weight, without training. The
last rows compare the mix with those single formats that had the lowest cost at one of the targets, at equal bytes.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator

from rich.console import Console

from benchmarks.bench import (
    ROUNDING,
    Bench,
    Measured,
    Row,
    bench_from_environment,
    candidates,
    measure_formats,
    mixed,
    planned,
    report,
    row,
)
from benchmarks.peers import ROOT, wanted_peers
from benchmarks.planner_instances import COSTS
from reallm.kernels.storage.atomic import write_text_atomic
from reallm.planner.results.uniform import uniform_plan
from reallm.planner.tables.measured_table import MeasuredTable

RESULTS = ROOT / "benchmarks" / "results" / "quality.json"
TARGETS = {2.0: 0.85, 2.5: 0.42, 3.0: 0.20, 3.5: 0.12, 4.0: 0.058}
"""Bits per weight -> target of the KL of the mix, on SmolLM2-135M and WikiText-2."""


def rows(bench: Bench, table: MeasuredTable) -> Iterator[Row]:
    """One row per target, one per peer, and one per single format that was best at one of the targets."""
    formats = []
    for bits, kl in TARGETS.items():
        chosen = mixed(bench, f"{bits}bpw")
        yield row(planned(bench, "reallm", chosen), Measured(f"target {kl}", bits, kl, float("nan"), {}))
        if chosen.uniform is not None and chosen.uniform.format not in formats:
            formats.append(chosen.uniform.format)
    for peer in wanted_peers():
        theirs = bench.peer(peer)
        yield row(planned(bench, "reallm", mixed(bench, f"{theirs.bits_per_weight}bpw")), theirs)
    for fmt in formats:
        uniform = uniform_plan(table, fmt, work=str(bench.work))
        mix = mixed(bench, f"{uniform.bits_per_weight + ROUNDING:.9f}bpw")
        yield row(planned(bench, "reallm", mix), planned(bench, f"uniform {fmt}", uniform))


def main() -> None:
    """Run what is missing, write the results and print them."""
    console = Console()
    bench = bench_from_environment(console)
    table = measure_formats(bench, "quality", candidates())
    write_costs(table, candidates())
    report("quality", rows(bench, table), RESULTS, console)


def write_costs(table: MeasuredTable, names: list[str]) -> None:
    """Write bytes and cost of linear layers in the formats `names` for NAME=planner: {"gate.0": {numel, formats}}."""
    formats = defaultdict(list)
    for record in sorted(table.measurements, key=lambda r: r.nbytes):
        if record.format in names:
            formats[record.matrix].append([record.nbytes, float(f"{record.two_sided:.4g}")])
    costs = {
        f"{m.name.rpartition('.')[2].removesuffix('_proj')}.{m.block}": {"numel": m.numel, "formats": formats[m.name]}
        for m in table.matrices
        if m.kind == "linear" and m.block is not None
    }
    write_text_atomic(COSTS, json.dumps(costs, sort_keys=True).replace('}, "', '},\n"') + "\n")


if __name__ == "__main__":
    main()
