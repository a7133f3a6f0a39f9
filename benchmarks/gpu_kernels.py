"""Products on this machine's GPU in microseconds, beside torch, gemlite and AQLM; `triton_kernels` runs it on a GPU.

Every time is of the full product from x in bf16 to y in bf16: for a rotated format it includes the kernels that prepare
x and finish y. Inputs change from call to call, so that they come from memory, and launches are recorded and replayed
(`gpu_timing`). Codes are random.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.bench import Figure, machine
from benchmarks.gpu_timing import microseconds, sets_for
from benchmarks.peers import PYTHON, ROOT
from reallm.codegen.launch.bindings import input_cache
from reallm.codegen.launch.derived_tensors import Derived, derive
from reallm.codegen.launch.launch import multiply
from reallm.kernels.codes.packing import pack_codes
from reallm.kernels.formats.codecs import TrellisCodec
from reallm.kernels.formats.formats import Format

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
"""Matrices of LLaMA-3-8B, [rows, cols]."""
FORMATS = {
    "tq2-l12+ldl2+rot": "gemlite 2 bits",
    "tq3-l12+ldl2+rot": "",
    "tq4-l12+ldl2+rot": "gemlite 4 bits",
    "uint2-g64": "gemlite 2 bits",
    "uint3-g64": "",
    "uint4-g64": "gemlite 4 bits",
    "lm2-g64": "gemlite 2 bits",
    "lm3-g64": "",
    "lm4-g64": "gemlite 4 bits",
    "aq2x8-d8": "aqlm 2x8",
    "e8p2+ldl+rot": "gemlite 2 bits",
    "km3": "",
}
"""Format -> the peer with as many bits; "" where there is none."""
PEER_SHAPES = 1
"""The peers run on this many of SHAPES: gemlite tunes itself for each."""
MANY = (64, 512)
MANY_FORMATS = ("tq3-l12+ldl2+rot", "uint4-g64", "lm3-g64", "aq2x8-d8")
SCALE_BYTE = 0x1C
"""The value of every byte of the stored floats, which gives 0.004 in half precision."""


def random_fields(fmt: Format, rows: int, cols: int) -> dict[str, torch.Tensor]:
    """Random codes of a matrix on the GPU, with small scales and one rate for all blocks of a trellis."""
    fields = {}
    for field in fmt.fields(rows, cols):
        if field.dtype[0] == "u":
            fields[field.name] = torch.randint(0, 256, (field.nbytes,), dtype=torch.uint8, device="cuda")
        else:
            fields[field.name] = torch.full((field.nbytes,), SCALE_BYTE, dtype=torch.uint8, device="cuda")
    if isinstance(fmt.codec, TrellisCodec):
        widths = torch.full((-(-cols // 16),), fmt.codec.eighths // 4)
        fields["widths"] = torch.from_numpy(pack_codes(widths.numpy(), 4)).cuda()
    return fields


def ours(fmt: Format, rows: int, cols: int, count: int) -> float:
    """Microseconds of our product with `count` rows of x."""

    def product(fields: dict[str, torch.Tensor], derived: Derived, x: torch.Tensor) -> None:
        input_cache(x).clear()  # so that every product computes x'
        multiply(fmt, fields, x, rows, cols, derived=derived)

    calls: list[Callable[[], object]] = []
    for _ in range(sets_for(fmt.nbytes(rows, cols))):
        fields = random_fields(fmt, rows, cols)
        x = torch.randn(count, cols, device="cuda", dtype=torch.bfloat16)
        calls.append(partial(product, fields, derive(fmt, fields, rows, cols), x))
    return microseconds(calls)


def dense(rows: int, cols: int, count: int) -> float:
    """Microseconds of torch's product in bf16 with `count` rows of x."""
    x = torch.randn(count, cols, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16) for _ in range(sets_for(2 * rows * cols))]
    return microseconds([partial(torch.nn.functional.linear, x, weight) for weight in weights])


def bandwidth() -> float:
    """Bytes per second, read and written, of a copy inside the GPU's memory."""
    source = torch.randint(0, 256, (1 << 30,), dtype=torch.uint8, device="cuda")
    goal = torch.empty_like(source)
    return 2 * source.numel() / microseconds([lambda: goal.copy_(source)] * 2) * 1e6


def peers() -> dict[tuple[str, tuple[int, int]], tuple[float, dict[str, str]]]:
    """(peer, shape) -> microseconds and versions, from a process in the peers' environment; none with PEERS=none."""
    if os.environ.get("PEERS") == "none":
        return {}
    python = os.environ.get("PEER_PYTHON") or str(PYTHON)
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch, "peers.json")
        shapes = [f"{rows},{cols}" for rows, cols in SHAPES[:PEER_SHAPES]]
        command = [python, "-m", "benchmarks.peer.peer_gpu", str(output), *shapes]
        environment = os.environ | {"PYTHONPATH": os.environ.get("PEER_PATH", "")}
        subprocess.run(command, check=True, cwd=ROOT, env=environment)
        entries = json.loads(output.read_text(encoding="utf-8")) if output.exists() else []
    return {(e["name"], tuple(e["shape"])): (e["microseconds"], e["versions"]) for e in entries}


def timed() -> Iterator[tuple[Figure, str]]:
    """Rows of the table, each with a note."""
    hardware = f"{machine()}, {torch.cuda.get_device_name()}"
    versions = {"reallm": version("reallm"), "triton": version("triton"), "torch": torch.__version__}
    copied, theirs = bandwidth(), peers()
    print(f"memory copies {copied / 1e12:.2f} TB/s", file=sys.stderr)
    for rows, cols in SHAPES:
        base = dense(rows, cols, 1)
        for name, peer in FORMATS.items():
            fmt = Format.parse(name)
            taken = ours(fmt, rows, cols, 1)
            floor = fmt.nbytes(rows, cols) / copied * 1e6
            bits = fmt.nbytes(rows, cols) * 8 / (rows * cols)
            note = f"{bits:.2f} bits; {taken / floor:.1f} x a copy's time for its bytes"
            figure = f"{name} of {rows} x {cols}, one row of x"
            yield Figure(figure, "us", taken, "torch bf16", base, taken / base, versions, hardware), note
            if (peer, (rows, cols)) in theirs:
                value, peer_versions = theirs[peer, (rows, cols)]
                yield Figure(figure, "us", taken, peer, value, taken / value, versions | peer_versions, hardware), note
    rows, cols = SHAPES[0]
    for count in MANY:
        base = dense(rows, cols, count)
        for name in MANY_FORMATS:
            taken = ours(Format.parse(name), rows, cols, count)
            figure = f"{name} of {rows} x {cols}, {count} rows of x"
            yield Figure(figure, "us", taken, "torch bf16", base, taken / base, versions, hardware), ""
