"""The Triton search for closed walks on this machine's GPU beside the native search on one thread of its CPU.

    python -m benchmarks.gpu_search

The same random tiles are searched by both; the share of tiles with the same codes and the ratio of the squared errors
say whether they agree. Speeds are in weights per second. With feedback between tiles, a matrix keeps one multiprocessor
busy, so MATRICES of them are searched at the same time too, in threads with a stream each.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers import ROOT
from reallm.codecs.trellis.encode import CLIPS, SCALES
from reallm.codecs.trellis.viterbi import closed_walks
from reallm.kernels.codes.trellis import TILE_WEIGHTS
from reallm.kernels.formats.codecs import TILE
from reallm.kernels.storage.atomic import canonical_json, write_text_atomic
from reallm.system.threads import one_thread

RESULTS = ROOT / "benchmarks" / "results" / "gpu_search.json"
TRELLISES = [(12, width) for width in (4, 2, 3, 6, 8, 12)] + [(8, 4), (10, 4), (14, 4), (16, 4)]
"""(state bits, width in half bits per weight), the most used first."""
SHARED, MANY = 64, 8192
"""Tiles that both search, and tiles for the speed of the GPU."""
MATRICES = 32


@dataclass(frozen=True)
class SearchSpeed:
    """One trellis, searched on the GPU and by the native search."""

    state_bits: int
    bits_per_weight: float
    feedback: bool
    same_tiles: float
    """Share of the tiles for which both find the same codes."""
    error_ratio: float | None
    """Squared error of the GPU's codes, divided by that of the native codes; None with feedback, where a different code
    changes the targets below it."""
    weights_per_second: float
    weights_per_second_together: float | None
    """With MATRICES at the same time; only with feedback."""
    native_weights_per_second: float


def compare(
    state_bits: int, width: int, feedback: bool, device: str, shared: int = SHARED, many: int = MANY
) -> SearchSpeed:
    """Search `shared` tiles with both, and time the GPU on `many` tiles, or on `shared` tiles with feedback."""
    generator = torch.Generator().manual_seed(state_bits * 100 + width)
    target = torch.randn(shared * TILE, TILE, generator=generator) / SCALES[width]
    below = 0.05 * torch.randn(shared, shared * TILE, TILE, generator=generator) if feedback else None
    on_device = target.to(device), None if below is None else below.to(device)

    def search(x: Tensor, coefficients: Tensor | None) -> tuple[Tensor, Any]:
        return closed_walks(x, state_bits, width, CLIPS[width], coefficients)

    with one_thread():
        search(target[:TILE], None)  # builds the native search
        native_seconds, (native, walks) = timed(lambda: search(target, below))
        values, states = search(*on_device)  # compiles the kernel
        speed_target = on_device[0] if feedback else torch.randn(many * TILE, TILE, device=device) / SCALES[width]
        seconds, _ = timed(lambda: search(speed_target, on_device[1]))
        together = together_seconds(lambda: search(*on_device), device) if feedback else None
    weights = shared * TILE_WEIGHTS
    error, native_error = (float((target - found.cpu()).double().square().sum()) for found in (values, native))
    return SearchSpeed(
        state_bits=state_bits,
        bits_per_weight=width / 2,
        feedback=feedback,
        same_tiles=float(np.mean((states == walks).all(1))),
        error_ratio=None if feedback else error / native_error,
        weights_per_second=speed_target.numel() / seconds,
        weights_per_second_together=None if together is None else MATRICES * weights / together,
        native_weights_per_second=weights / native_seconds,
    )


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result) of one call, whose result is on the CPU when it ends."""
    began = time.perf_counter()
    result = action()
    return time.perf_counter() - began, result


def together_seconds(action: Callable[[], Any], device: str) -> float:
    """Seconds of MATRICES calls at the same time, each in its own thread and stream."""

    def run() -> None:
        stream = torch.cuda.Stream() if device.startswith("cuda") else None
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            action()

    with ThreadPoolExecutor(MATRICES) as pool:
        seconds, _ = timed(lambda: [future.result() for future in [pool.submit(run) for _ in range(MATRICES)]])
    return seconds


def rows(device: str) -> Iterator[SearchSpeed]:
    """Every trellis without feedback, and the first with it."""
    yield compare(*TRELLISES[0], feedback=False, device=device)
    yield compare(*TRELLISES[0], feedback=True, device=device)
    for state_bits, width in TRELLISES[1:]:
        yield compare(state_bits, width, feedback=False, device=device)


def main() -> int:
    """Compare, write and print; 1 if the codes differ anywhere."""
    done = []
    for row in rows("cuda"):
        done.append(row)
        write_text_atomic(RESULTS, canonical_json([asdict(each) for each in done]))
        print(json.dumps(asdict(row)), flush=True)
    return int(any(row.same_tiles < 1 for row in done))


if __name__ == "__main__":
    sys.exit(main())
