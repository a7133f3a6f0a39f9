"""The peak memory use of this process."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""What proc(5) says to write to CLEAR."""


def peak_rss_bytes() -> int:
    """Peak resident set size of this process so far, in bytes.

    On Linux this is VmHWM, because getrusage also counts memory of the parent process from before the exec. On other
    systems it is getrusage's ru_maxrss, which is in bytes on macOS and in KiB elsewhere.
    """
    if STATUS.exists():
        for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_rss() -> None:
    """Let `peak_rss_bytes` count from now on; where the system cannot (all but Linux), it counts from the start."""
    with suppress(OSError):
        CLEAR.write_text(RESET_PEAK, encoding="ascii")
