"""Running a command under an enforced memory limit: a control group of Linux (version 1 or 2), which counts pages of
files too. The kernel kills a process that needs more than the limit.
"""

from __future__ import annotations

import atexit
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Run:
    """One run of a command under the limit."""

    seconds: float
    processor_seconds: float
    peak_bytes: int
    """Peak memory of its processes without pages of files, which the kernel can drop."""
    killed: bool
    """Whether this benchmark killed it on purpose."""
    returned: int


class MemoryLimit:
    """A control group with a memory limit, in bytes. Raises OSError where this machine does not let us make one."""

    def __init__(self, nbytes: int) -> None:
        first = (MOUNT / "memory").is_dir()
        self.folder = (MOUNT / "memory" if first else MOUNT) / f"reallm-{os.getpid()}"
        self.folder.mkdir(exist_ok=True)
        atexit.register(self._remove)
        (self.folder / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(nbytes))
        self._keys = ("total_rss", "total_shmem") if first else ("anon", "shmem")

    def _remove(self) -> None:
        with suppress(OSError):  # a process of it is still there
            self.folder.rmdir()

    def used(self) -> int:
        """Bytes of memory that its processes use now, without pages of files."""
        fields = dict(line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
        return sum(int(fields.get(key, 0)) for key in self._keys)

    def run(self, command: Sequence[str], kill_when: Callable[[], bool] | None, watch: Callable[[], None]) -> Run:
        """Run `command` to its end, or until `kill_when` is true: then kill it and all its processes (kill -9).

        `watch` is called several times a second.
        """
        began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        process = subprocess.Popen(command, preexec_fn=self._enter, start_new_session=True)
        peak, killed = 0, False
        while process.poll() is None:
            peak = max(peak, self.used())
            watch()
            if kill_when is not None and kill_when():
                os.killpg(process.pid, signal.SIGKILL)
                killed = True
            time.sleep(POLL_SECONDS)
        process.wait()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return Run(time.monotonic() - began, spent, peak, killed, process.returncode)

    def _enter(self) -> None:
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))
