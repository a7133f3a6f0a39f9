"""The Triton search for closed walks without a GPU: its instructions, and the seconds that they would take.

    make bench NAME=trellis_search

The kernel is compiled for sm_80 and sm_90 and its machine code is counted: instructions of all threads per weight, and
per weight and state (its two passes take 1.5 steps over all 2^L states for each weight; one step where a step has two
weights). Seconds are those of WEIGHTS weights if every multiprocessor started four warps per cycle, or two per cycle on
its integer pipe, whichever takes longer, and never waited; memory is not modelled. They are a bound on paper, not a
measurement. They also assume that all multiprocessors are busy. With feedback between tiles a matrix keeps one of them
busy, so hundreds of matrices must be coded at the same time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version

from rich.console import Console

from benchmarks.machine_code.search_code import search_cost
from benchmarks.peers import ROOT
from reallm.cli.tables import columns_table
from reallm.kernels.storage.atomic import canonical_json, write_text_atomic

RESULTS = ROOT / "benchmarks" / "results" / "trellis_search.json"
WEIGHTS = 6_979_321_856
"""Weights of the decoder linears of LLaMA-3-8B."""
GPUS = {80: ("A100", 108, 1.41e9), 90: ("H100 SXM", 132, 1.83e9)}
"""Compute capability -> (GPU, multiprocessors, cycles per second)."""
ISSUED, INTEGER = 128, 64
"""Instructions of single threads that a multiprocessor starts per cycle: all, and those of the integer pipe."""
TRELLISES = [(bits, width) for bits in (8, 10, 12) for width in (2, 4, 6, 8)] + [(12, 3), (12, 12), (14, 4), (16, 4)]


@dataclass(frozen=True)
class SearchRow:
    """The search for one trellis on one GPU."""

    target: str
    state_bits: int
    bits_per_weight: float
    instructions_per_weight: float
    instructions_per_weight_and_state: float
    pointer_bytes_per_weight: float
    registers: int
    shared_bytes: int
    spilled_bytes: int
    gpu: str
    weights: int
    seconds_on_paper: float
    pointer_terabytes: float
    versions: dict[str, str]


def rows() -> Iterator[SearchRow]:
    """One row for each trellis and GPU."""
    versions = {"reallm": version("reallm"), "triton": version("triton")}
    for architecture, (gpu, multiprocessors, clock) in GPUS.items():
        for state_bits, width in TRELLISES:
            cost = search_cost(architecture, state_bits, width)
            cycles = max(cost.instructions_per_weight / ISSUED, cost.alu_per_weight / INTEGER)
            yield SearchRow(
                target=f"sm_{architecture}",
                state_bits=state_bits,
                bits_per_weight=width / 2,
                instructions_per_weight=round(cost.instructions_per_weight, 1),
                instructions_per_weight_and_state=round(cost.instructions_per_weight / (1 << state_bits), 3),
                pointer_bytes_per_weight=cost.pointer_bytes_per_weight,
                registers=cost.registers,
                shared_bytes=cost.shared_bytes,
                spilled_bytes=cost.spilled_bytes,
                gpu=gpu,
                weights=WEIGHTS,
                seconds_on_paper=round(WEIGHTS * cycles / (multiprocessors * clock), 2),
                pointer_terabytes=round(WEIGHTS * cost.pointer_bytes_per_weight / 1e12, 3),
                versions=versions,
            )


def _line(row: SearchRow) -> list[str]:
    counts = [f"{row.instructions_per_weight:.0f}", f"{row.instructions_per_weight_and_state:.1f}"]
    memory = [str(row.registers), str(row.spilled_bytes), f"{row.seconds_on_paper:.1f}", f"{row.pointer_terabytes:.2f}"]
    return [row.target, f"2^{row.state_bits}", f"{row.bits_per_weight:g}", *counts, *memory]


def main() -> None:
    """Count, write and print."""
    done: list[SearchRow] = []
    for row in rows():
        done.append(row)
        write_text_atomic(RESULTS, canonical_json([asdict(r) for r in done]))
    headings = ("target", "states", "bits", "a weight", "a state", "registers", "spilled", "seconds", "TB of pointers")
    lines = [_line(row) for row in done]
    Console(width=140).print(columns_table("The search for closed walks, 8B weights on paper", headings, lines))


if __name__ == "__main__":
    sys.exit(main())
