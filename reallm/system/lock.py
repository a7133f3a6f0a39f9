"""One process at a time in a folder; the kernel lets go of the lock when its holder ends, also under kill -9.

On a shared file system the lock holds across machines wherever flock does: NFS on Linux, Lustre mounted with it.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

LOG = logging.getLogger(__name__)
LOCK_FILE = ".lock"
NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK})


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Hold `folder` (made if need be); waits, and says so, while another process holds it.

    On a file system without locks it says that nothing else may work there, and goes on.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            stream = (folder / LOCK_FILE).open("w", encoding="utf-8")
        except FileNotFoundError:
            continue  # its last holder removed the folder
        with stream:
            _hold(stream, folder)
            if not _is_at(stream.fileno(), folder / LOCK_FILE):
                continue
            yield
            return


def _hold(stream: IO[str], folder: Path) -> None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        LOG.warning("another process is at work in %s: waiting for it", folder)
        fcntl.flock(stream, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        LOG.warning("%s cannot be locked (%s): let nothing else work in it", folder, error.strerror)


def remove_abandoned(folders: Iterable[Path]) -> None:
    """Remove those of `folders` whose holder has ended."""
    for folder in folders:
        try:
            with (folder / LOCK_FILE).open("w", encoding="utf-8") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
        except OSError:  # held, gone meanwhile, or on a file system without locks
            continue


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
