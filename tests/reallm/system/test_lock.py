"""The lock of a folder survives the removal of the folder by its holder, and does not count as content of it."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
from pathlib import Path

import pytest

from reallm.finetuning.checkpoints import open_progress
from reallm.system.lock import LOCK_FILE, exclusive_lock


def test_a_waiting_process_gets_the_folder_even_after_its_removal(tmp_path: Path) -> None:
    folder, inside, held = tmp_path / "run", threading.Event(), []

    def wait() -> None:
        with exclusive_lock(folder):
            held.append((folder / LOCK_FILE).exists())
            inside.set()

    with exclusive_lock(folder):
        waiter = threading.Thread(target=wait)
        waiter.start()
        assert not inside.wait(0.2)
        shutil.rmtree(folder)
    waiter.join(10)
    assert held == [True]


def test_a_locked_folder_counts_as_empty_and_keeps_its_lock(tmp_path: Path) -> None:
    with exclusive_lock(tmp_path):
        open_progress(tmp_path, {"steps": 1}, resume=True)
        (tmp_path / "checkpoint-1").mkdir()
        open_progress(tmp_path, {"steps": 2}, resume=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK_FILE, "settings.json"]


def test_a_file_system_without_locks_gives_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(stream: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with exclusive_lock(tmp_path):
        assert "cannot be locked (Function not implemented): make sure that no other process works in it" in caplog.text
