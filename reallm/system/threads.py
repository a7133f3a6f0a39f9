"""The number of threads that torch uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Make torch compute on one thread within the context, so that results do not depend on the number of cores.

    This also leaves the other cores free for threads outside torch: torch's OpenMP threads would otherwise spin for
    milliseconds after each loop.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
