"""Quality at equal bytes: reallm beside the targets it was given and the methods of benchmarks/peers.py.

    make bench NAME=quality [MODEL=...] [TEXT=calibration] [TEST=held-out] [JOBS=2]

All in this one run; the calibration tokens are the same for all that calibrate. Bits per weight count every byte of
ours (padding too) and of the peers their codes, scales and zeros. Ours is the planner's mix at the peer's own bits,
without any training; the last rows are the best single format of ours at its own bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from benchmarks.bench import (
    NSAMPLES,
    ROUNDING,
    SEQLEN,
    Bench,
    Measured,
    Row,
    bench_from_environment,
    planned,
    report,
    row,
)
from benchmarks.peers import PEERS, ROOT
from reallm.measurement import measure
from reallm.planner.records import TABLE_FILE, MeasuredTable, read_record
from reallm.planner.uniform import uniform_plan
from reallm.planning import plan

RESULTS = ROOT / "benchmarks" / "results" / "quality.json"
TARGETS = {2.0: 0.85, 2.5: 0.42, 3.0: 0.20, 3.5: 0.12, 4.0: 0.058}
"""Bits per weight -> KL that the mix is to stay under on SmolLM2-135M and WikiText-2."""


def rows(bench: Bench, work: Path) -> Iterator[Row]:
    """A row a target, a row a peer, then a row a uniform format that was best at one of those."""
    table = read_record(work / TABLE_FILE, MeasuredTable, "measure")
    formats = []
    for bits, kl in TARGETS.items():
        chosen = plan(work, budget=f"{bits}bpw")
        yield row(planned(bench, "reallm", chosen), Measured(f"target {kl}", bits, kl, float("nan"), {}))
        if chosen.uniform is not None and chosen.uniform.format not in formats:
            formats.append(chosen.uniform.format)
    for peer in PEERS:
        theirs = bench.peer(peer)
        yield row(planned(bench, "reallm", plan(work, budget=f"{theirs.bits_per_weight}bpw")), theirs)
    for fmt in formats:
        uniform = uniform_plan(table, fmt, work=str(work))
        chosen = plan(work, budget=f"{uniform.bits_per_weight + ROUNDING:.9f}bpw")
        yield row(planned(bench, "reallm", chosen), planned(bench, f"uniform {fmt}", uniform))


def main() -> None:
    """Run what is missing, write the results and print them."""
    console = Console()
    bench = bench_from_environment(console)
    jobs, space = int(os.environ.get("JOBS") or -1), os.environ.get("SPACE") or "default"
    measure(
        bench.base_folder, text=bench.text, output=bench.work, space=space, nsamples=NSAMPLES, seqlen=SEQLEN, jobs=jobs
    )
    report("quality", rows(bench, bench.work), RESULTS, console)


if __name__ == "__main__":
    main()
