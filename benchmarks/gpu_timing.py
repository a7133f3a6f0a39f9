"""Timing of short calls on a GPU: a CUDA graph over inputs larger than the caches is recorded and replayed."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence

import torch

BYTES = 160e6
"""Bytes of all inputs of one recording: three times the cache of an H100."""
MAX_SETS, ROUNDS, TURNS = 64, int(os.environ.get("ROUNDS") or 15), 2


def sets_for(nbytes: int) -> int:
    """The number of different inputs of `nbytes` to use in turn."""
    return max(2, min(MAX_SETS, int(BYTES / nbytes) + 1))


def microseconds(calls: Sequence[Callable[[], object]]) -> float:
    """Microseconds per call: the median over ROUNDS replays, each of all calls TURNS times."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(TURNS):
            for call in calls:
                call()
    taken = []
    for turn in range(ROUNDS + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if turn:
            taken.append(begin.elapsed_time(end) * 1e3 / (len(calls) * TURNS))
    return statistics.median(taken)
