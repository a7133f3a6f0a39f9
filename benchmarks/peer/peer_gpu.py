"""Times gemlite's and AQLM's products of one row of x on a GPU.

    python -m benchmarks.peer.peer_gpu OUTPUT [ROWS,COLS]...

Run in the peers' own environment, from the project's folder. Writes the JSON file OUTPUT, a list of objects with name,
shape, microseconds and versions. At the first call gemlite tunes itself and AQLM's CUDA kernel for 2x8 is built.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_timing import microseconds, sets_for

GROUP_SIZE, DIM = 64, 8


def gemlite(bits: int, rows: int, cols: int) -> list[Callable[[], object]]:
    """Calls of gemlite's A16Wn linear with groups of GROUP_SIZE, scales and zeros, each on other weights."""
    from gemlite.helper import A16Wn

    x = torch.randn(1, cols, device="cuda", dtype=torch.float16)
    calls = []
    for _ in range(sets_for(rows * cols * bits // 8)):
        codes = torch.randint(0, 1 << bits, (rows, cols), device="cuda", dtype=torch.uint8)
        scales = torch.rand(rows, cols // GROUP_SIZE, device="cuda", dtype=torch.float16)
        zeros = torch.full_like(scales, (1 << bits) / 2)
        module = A16Wn(device="cuda:0", dtype=torch.float16).from_weights(codes, scales, zeros, bits, GROUP_SIZE)
        calls.append(lambda module=module: module(x))
    return calls


def aqlm(count: int, bits: int, rows: int, cols: int) -> list[Callable[[], object]]:
    """Calls of AQLM's forward kernel with `count` codebooks of 2^bits words, each on other weights."""
    from aqlm.inference_kernels.kernel_selector import get_forward_pass_kernel

    x = torch.randn(1, cols, device="cuda", dtype=torch.float16)
    codebooks = torch.randn(count, 1 << bits, 1, DIM, device="cuda", dtype=torch.float16)
    kernel = get_forward_pass_kernel(codebooks, False)
    dtype, limit = (torch.int8, 128) if bits == 8 else (torch.int16, 1 << (bits - 1))
    calls = []
    for _ in range(sets_for(rows * cols // DIM * count * dtype.itemsize)):
        shape = (rows, cols // DIM, count)
        codes = torch.randint(-limit if bits == 8 else 0, limit, shape, device="cuda", dtype=dtype)
        scales = torch.randn(rows, 1, 1, 1, device="cuda", dtype=torch.float16)
        calls.append(lambda codes=codes, scales=scales: kernel(x, codes, codebooks, scales, None))
    return calls


def main() -> None:
    """Time everything; if a peer fails, its error is printed and the others continue."""
    output, shapes = Path(sys.argv[1]), [tuple(map(int, text.split(","))) for text in sys.argv[2:]]
    entries: list[dict[str, Any]] = []
    makers: dict[str, Callable[..., list[Callable[[], object]]]] = {
        "gemlite 2 bits": partial(gemlite, 2),
        "gemlite 4 bits": partial(gemlite, 4),
        "aqlm 2x8": partial(aqlm, 2, 8),
    }
    for rows, cols in shapes:
        for name, make in makers.items():
            try:
                versions = {package: version(package) for package in (name.split()[0], "triton", "torch")}
                taken = microseconds(make(rows, cols))
            except Exception:  # noqa: BLE001 - a peer may raise anything; the others are still timed
                print(f"{name} [{rows}, {cols}]: {traceback.format_exc(limit=-2)}", file=sys.stderr)
                continue
            entries.append({"name": name, "shape": [rows, cols], "microseconds": taken, "versions": versions})
            output.write_text(json.dumps(entries), encoding="utf-8")


if __name__ == "__main__":
    main()
