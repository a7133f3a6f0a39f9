"""What tests of training share: one thread for models this small, and a text of letters."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tuning import write_letters


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from more, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 windows of letters."""
    return write_letters(tmp_path_factory.mktemp("text") / "train.txt", 40)
