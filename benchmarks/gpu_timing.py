"""Timing of short calls on a GPU: recorded as a CUDA graph over inputs that exceed its caches, and replayed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

BYTES = 160e6
"""Of all inputs of one recording: three times the cache of an H100."""
MOST_SETS, ROUNDS, TURNS = 64, 15, 2


def sets_for(nbytes: int) -> int:
    """How many inputs of so many bytes to go through in turn."""
    return max(2, min(MOST_SETS, int(BYTES / nbytes) + 1))


def microseconds(calls: Sequence[Callable[[], object]]) -> float:
    """Microseconds of a call: the median of ROUNDS replays of all calls, TURNS times each, over their number."""
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
