"""Memory: the peak of this process, and how much is still available to it."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

STATUS = Path("/proc/self/status")
CGROUP = Path("/proc/self/cgroup")
CGROUP_MOUNT = Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 60
"""Limits from here on are the kernel's way of saying that there is none."""
CLEAR = Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""What proc(5) says to write to CLEAR."""


def peak_rss_bytes() -> int:
    """Peak resident set size of this process so far, in bytes.

    On Linux this is VmHWM, because getrusage also counts memory of the parent process from before the exec. On other
    systems it is getrusage's ru_maxrss, which is in bytes on macOS and in KiB elsewhere. Pages of mapped files that
    happen to be in memory are included.
    """
    if STATUS.exists():
        for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory() -> int:
    """Bytes that this process can still allocate: what the machine has free, or less within a control group's limit.

    Pages of files count as free, because the kernel drops them when it needs memory.
    """
    return max(0, min([psutil.virtual_memory().available, *_left_in_groups()]))


def _left_in_groups() -> Iterator[int]:
    """What the limits of this process's control groups leave, for every group on the way to the root that has one."""
    if not CGROUP.exists():
        return
    for line in CGROUP.read_text(encoding="utf-8", errors="replace").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = CGROUP_MOUNT / controllers
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            if group == root.parent:
                break
            if (left := _left(group)) is not None:
                yield left


def _left(group: Path) -> int | None:
    """Bytes left within the limit of one control group of version 1 or 2; None where it has no limit."""
    for limit_name, keys in (("memory.max", ("anon",)), ("memory.limit_in_bytes", ("total_rss", "total_shmem"))):
        try:
            limit = int((group / limit_name).read_text(encoding="ascii"))
            fields = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        except (OSError, ValueError):  # no such file here, or "max"
            continue
        if limit < _NO_LIMIT:
            return limit - sum(int(fields.get(key, 0)) for key in keys)
    return None


def reset_peak_rss() -> None:
    """Let `peak_rss_bytes` count from now on; where the system cannot (all but Linux), it counts from the start."""
    with suppress(OSError):
        CLEAR.write_text(RESET_PEAK, encoding="ascii")
