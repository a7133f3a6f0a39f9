"""The native CPU kernels compared with torch, aten's int4 kernel, and partial-dot tables as in AQLM's CPU kernel.

    make bench NAME=kernels [THREADS=1,2]

One row of x times a matrix, at the shapes of SmolLM2-135M's linears and at 4096 x 4096, in processor time of the
calling thread; with two threads this thread computes its share and waits for the rest, so its time is that of the
product. Each product is timed ROUNDS times, all methods and shapes in turn, and the fastest time counts: other work on
the processor slows some rounds, and slows computation more than waiting for memory, so a median would depend on it.
Matrices are random; those of a trellis have the same width in all blocks. AQLM's kernel (peer_numba.py) runs in the
peers' environment, on one thread, for aq2x8-d8.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from types import TracebackType

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.bench import Figure, machine
from benchmarks.peers import PYTHON, ROOT
from reallm.cli.tables import columns_table
from reallm.kernels.codes.packing import pack_codes, pad
from reallm.kernels.formats.codecs import TrellisCodec
from reallm.kernels.formats.fields import Field
from reallm.kernels.formats.formats import Format
from reallm.kernels.storage.atomic import canonical_json, write_text_atomic
from reallm.runtime.cpu import NativeMatrix, native_matrix

RESULTS = ROOT / "benchmarks" / "results" / "kernels.json"
SHAPES = ((576, 576), (1536, 576), (576, 1536), (4096, 4096))
TRELLIS = ("tq1-l12+rot", "tq2-l12+rot", "tq2.5-l12+rot", "tq3-l12+rot", "tq4-l12+rot")
FORMATS = (*TRELLIS, "int4-g64", "nf4-g64", "int8-g64", "aq1x8-d8", "aq2x8-d8", "e8p2", "e8p3", "e8p4", "km3")
NUMBA_FORMAT = "aq2x8-d8"
ROUNDS, ROUND_SECONDS = 60, 0.003
INT4_GROUP = 64
Timer = Callable[[], float]
"""Processor seconds of one product."""


@dataclass(frozen=True)
class Row(Figure):
    """Nanoseconds per 1000 weights, and the rates in weights per second."""

    threads: int
    weights_per_second: float
    peer_weights_per_second: float | None


def timer(product: Callable[[], object]) -> Timer:
    """A timer of `product`, averaged over as many calls as fit into ROUND_SECONDS."""
    product()
    began, count = time.thread_time(), 0
    while time.thread_time() - began < ROUND_SECONDS:
        product()
        count += 1

    def once() -> float:
        start = time.thread_time()
        for _ in range(count):
            product()
        return (time.thread_time() - start) / count

    return once


def _field(field: Field, codec: object, rng: np.random.Generator) -> Tensor:
    if field.name == "widths" and isinstance(codec, TrellisCodec):
        return torch.from_numpy(pack_codes(np.full(field.count, codec.eighths // 4), 4))
    if field.dtype[0] == "u":
        return torch.from_numpy(rng.integers(0, 256, field.nbytes).astype(np.uint8))
    return torch.from_numpy(pad(rng.standard_normal(field.count).astype("<f2").tobytes()))


def our_matrix(name: str, rows: int, cols: int) -> NativeMatrix:
    """A random matrix in the format `name`. Raises RuntimeError where it has no native kernel."""
    fmt, rng = Format.parse(name), np.random.default_rng(0)
    fields = {field.name: _field(field, fmt.codec, rng) for field in fmt.fields(rows, cols)}
    matrix = native_matrix(fmt, fields, rows, cols)
    if matrix is None:
        raise RuntimeError(f"{name} has no native kernel here")
    return matrix


def aten_int4(rows: int, cols: int) -> Timer | None:
    """Timer of aten's int4 kernel for groups of INT4_GROUP; None where this torch does not have it."""
    operations = torch.ops.aten
    if not hasattr(operations, "_weight_int4pack_mm_for_cpu"):
        return None
    codes = torch.randint(0, 16, (rows, cols), dtype=torch.int32)
    packed = operations._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.randn(cols // INT4_GROUP, rows, 2, dtype=torch.bfloat16)
    x = torch.randn(1, cols, dtype=torch.bfloat16)
    return timer(lambda: operations._weight_int4pack_mm_for_cpu(x, packed, INT4_GROUP, scales))


class NumbaPeer(AbstractContextManager["NumbaPeer"]):
    """peer_numba.py in a separate process: for each shape written to it, it answers with the seconds of one product."""

    def __init__(self) -> None:
        command = [str(PYTHON), str(ROOT / "benchmarks" / "peer" / "peer_numba.py")]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version = self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return str(json.loads(self.process.stdout.readline()))

    def timer(self, rows: int, cols: int) -> Timer:
        def once() -> float:
            assert self.process.stdin is not None
            self.process.stdin.write(f"{rows} {cols}\n")
            self.process.stdin.flush()
            return float(self._answer())

        once()
        return once

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def timers(rows: int, cols: int, threads: int, numba: NumbaPeer) -> tuple[dict[str, Timer], dict[str, Timer]]:
    """(format -> timer of ours, peer -> timer)."""
    x = torch.randn(1, cols)
    ours = {}
    for name in FORMATS:
        matrix = our_matrix(name, rows, cols)
        ours[name] = timer(partial(matrix.linear, x))
    peers: dict[str, Timer] = {}
    for dtype in (torch.bfloat16, torch.float32):
        weight, inputs = torch.randn(rows, cols, dtype=dtype), x.to(dtype)
        name = f"torch {str(dtype).removeprefix('torch.')}"
        peers[name] = timer(partial(linear, inputs, weight))
    if int4 := aten_int4(rows, cols):
        peers["aten int4 g64"] = int4
    if threads == 1:
        peers["numba"] = numba.timer(rows, cols)
    return ours, peers


Key = tuple[tuple[int, int], str, str]
"""(shape, "ours" or "peer", name)."""


def measured(threads: int, numba: NumbaPeer) -> dict[Key, float]:
    """Nanoseconds per 1000 weights, the fastest of ROUNDS."""
    torch.set_num_threads(threads)
    all_timers: dict[Key, Timer] = {}
    for shape in SHAPES:
        for side, by_name in zip(("ours", "peer"), timers(*shape, threads, numba), strict=True):
            all_timers |= {(shape, side, name): once for name, once in by_name.items()}
    best = dict.fromkeys(all_timers, math.inf)
    for _ in range(ROUNDS):
        for key, once in all_timers.items():
            best[key] = min(best[key], once())
    return {key: seconds / math.prod(key[0]) * 1e12 for key, seconds in best.items()}


def rows_of(shape: tuple[int, int], threads: int, times: dict[Key, float], numba: NumbaPeer) -> Iterator[Row]:
    """Rows of one shape: every format beside torch, and the other peers beside the formats they resemble."""
    versions = {"torch": torch.__version__, "numba": numba.version}
    pairs = [(name, peer) for name in FORMATS for peer in ("torch bfloat16", "torch float32")]
    pairs += [(name, "aten int4 g64") for name in ("int4-g64", "nf4-g64", "tq4-l12+rot")]
    pairs += [(NUMBA_FORMAT, "numba")]
    for name, peer_name in pairs:
        ours, peer = times[shape, "ours", name], times.get((shape, "peer", peer_name))
        yield Row(
            figure=f"{name} [{shape[0]}, {shape[1]}]",
            unit="ns per 1000 weights",
            ours=ours,
            peer_name=peer_name,
            peer=peer,
            ratio=ours / peer if peer else None,
            versions=versions,
            machine=machine(),
            threads=threads,
            weights_per_second=1e12 / ours,
            peer_weights_per_second=1e12 / peer if peer else None,
        )


def main() -> None:
    console = Console()
    rows: list[Row] = []
    with torch.inference_mode(), NumbaPeer() as numba:
        for threads in map(int, os.environ.get("THREADS", "1,2").split(",")):
            times = measured(threads, numba)
            for shape in SHAPES:
                rows += rows_of(shape, threads, times, numba)
    write_text_atomic(RESULTS, canonical_json([asdict(row) for row in rows]))
    lines = [
        (
            row.figure,
            str(row.threads),
            f"{row.weights_per_second / 1e9:.1f}",
            row.peer_name,
            _billions(row),
            _ratio(row),
        )
        for row in rows
    ]
    console.print(
        columns_table(
            "Products on the CPU", ("matrix", "threads", "10^9 weights/s", "peer", "its", "ratio of times"), lines
        )
    )


def _billions(row: Row) -> str:
    return "" if row.peer_weights_per_second is None else f"{row.peer_weights_per_second / 1e9:.1f}"


def _ratio(row: Row) -> str:
    return "" if row.ratio is None else f"{row.ratio:.2f}"


if __name__ == "__main__":
    main()
