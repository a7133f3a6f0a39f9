"""Progress of long work: a bar on a terminal, plain lines now and then in a log file."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 30.0
"""Minimum seconds between two lines of one task in a log file."""


class ProgressLines(tqdm):  # type: ignore[type-arg]  # generic in its stubs only
    """A tqdm that writes whole lines, at most one every LINE_SECONDS and one at the end, without carriage returns."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        settings |= {"mininterval": LINE_SECONDS, "maxinterval": LINE_SECONDS, "miniters": 1, "ncols": 0}
        super().__init__(*args, **settings)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write one line; nothing before the first step."""
        if self.n > self.initial:
            self.fp.write(f"{msg or self}\n".lstrip("\r"))
            self.fp.flush()

    def clear(self, nolock: bool = False) -> None:
        """Lines that were written stay."""

    def close(self) -> None:
        """Write the last line."""
        if self.disable:
            return
        self.disable = True
        self._decr_instances(self)  # type: ignore[attr-defined]  # not in its stubs
        self.display()


def progress_bar(iterable: Iterable[Any] | None = None, **settings: Any) -> tqdm[Any]:
    """A tqdm on standard error: a bar where that is a terminal, else ProgressLines.

    `settings` are tqdm's own: total, initial, desc, unit, unit_scale, disable, leave.

    >>> [n for n in progress_bar(range(3), desc="count", disable=True)]
    [0, 1, 2]
    """
    settings.setdefault("disable", False)  # said explicitly, this wins over TQDM_DISABLE
    bar: tqdm[Any] = (tqdm if sys.stderr.isatty() else ProgressLines)(iterable, **settings)
    return bar
