"""Fixtures that tests of training share: a single thread, and a text of letters."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tuning import write_letters


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Compute on one thread: tiny models do not gain from more, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a text with 40 windows of letters."""
    return write_letters(tmp_path_factory.mktemp("text") / "train.txt", 40)
