"""Progress of long tasks: a bar on a terminal, or plain lines at intervals in a log file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 30.0
"""Minimum number of seconds between two lines of the same task in a log file."""


bar_maker: Callable[..., Any] | None = None
"""The class of bars while a job of several stages runs (`job_progress`); None outside."""


class ProgressLines(tqdm):  # type: ignore[type-arg]  # generic in its stubs only
    """A tqdm that writes whole lines, at most one every LINE_SECONDS and one at the end, without carriage returns."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        settings |= {"mininterval": LINE_SECONDS, "maxinterval": LINE_SECONDS, "miniters": 1, "ncols": 0}
        super().__init__(*args, **settings)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write one line, unless the task has not made its first step yet."""
        if self.n > self.initial:
            self.fp.write(f"{msg or self}\n".lstrip("\r"))
            self.fp.flush()

    def clear(self, nolock: bool = False) -> None:
        """Do nothing: lines that have been written stay."""

    def close(self) -> None:
        """Write the last line."""
        if self.disable:
            return
        self.disable = True
        self._decr_instances(self)  # type: ignore[attr-defined]  # not in its stubs
        self.display()


def progress_bar(iterable: Iterable[Any] | None = None, **settings: Any) -> tqdm[Any]:
    """Make a tqdm that writes to standard error: a bar if that is a terminal, else ProgressLines.

    `settings` are the keyword arguments of tqdm: total, initial, desc, unit, unit_scale, disable, leave.

    >>> [n for n in progress_bar(range(3), desc="count", disable=True)]
    [0, 1, 2]
    """
    settings.setdefault("disable", False)  # an explicit argument overrides the environment variable TQDM_DISABLE
    maker = bar_maker if bar_maker is not None and not settings["disable"] else None
    bar: tqdm[Any] = (maker or (tqdm if sys.stderr.isatty() else ProgressLines))(iterable, **settings)
    return bar


@contextmanager
def without_bars_in_files() -> Iterator[None]:
    """Within the context, transformers draws no progress bars unless stderr is a terminal: they fill log files."""
    from transformers.utils import logging

    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
