"""One process that runs kernels under Triton's interpreter, for all tests of this folder."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import interpreted
import pytest


@pytest.fixture(scope="session")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    """A pool of one process, which starts once: importing torch and Triton takes seconds."""
    cache = tmp_path_factory.mktemp("cache")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=interpreted.start, initargs=(cache,)) as pool:
        yield pool
