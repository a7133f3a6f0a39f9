"""One process at a time in a folder; the kernel lets go of the lock when its holder ends, also under kill -9."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOG = logging.getLogger(__name__)
LOCK_FILE = ".lock"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold `folder` (made if need be); waits, and says so, while another process holds it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOCK_FILE).open("w", encoding="utf-8") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                LOG.warning("another process is at work in %s: waiting for it", folder)
                fcntl.flock(stream, fcntl.LOCK_EX)
            if not _is_at(stream.fileno(), folder / LOCK_FILE):
                continue  # its last holder removed the folder
            yield
            return


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
