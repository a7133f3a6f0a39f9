"""A lock that lets one process at a time work in a folder.

The operating system releases the lock when the process that holds it ends, even by kill -9. On a shared file system the
lock excludes processes on other machines only if flock does: on NFS with Linux, and on Lustre mounted with the option
flock.
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
"""Error numbers by which flock reports that the file system does not support locks."""


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder` within the context; create the folder if necessary.

    While another process holds the lock, this waits and logs a warning. On a file system without locks, it logs a
    warning that no other process may work in the folder, and continues.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            stream = (folder / LOCK_FILE).open("w", encoding="utf-8")
        except FileNotFoundError:
            continue  # the process that held the lock has removed the folder
        with stream:
            _acquire(stream, folder)
            if not _is_same_file(stream.fileno(), folder / LOCK_FILE):
                continue
            yield
            return


def _acquire(stream: IO[str], folder: Path) -> None:
    """Lock the open file `stream`, waiting if necessary."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        LOG.warning("another process is working in %s: waiting for it to finish", folder)
        fcntl.flock(stream, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        LOG.warning("%s cannot be locked (%s): make sure that no other process works in it", folder, error.strerror)


def remove_abandoned(folders: Iterable[Path]) -> None:
    """Remove those of `folders` whose lock no running process holds."""
    for folder in folders:
        try:
            with (folder / LOCK_FILE).open("w", encoding="utf-8") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
        except OSError:  # locked by another process, already removed, or on a file system without locks
            continue


def _is_same_file(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`, which may have been removed and created again."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
