"""The number of threads that torch computes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Make torch compute on one thread within the context, so that results do not depend on the number of cores.

    It also leaves the other cores to threads that are not torch's: OpenMP's threads spin for milliseconds after a loop.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
