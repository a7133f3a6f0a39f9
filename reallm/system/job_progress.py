"""Progress of a job of several stages: one line with the stage, the share of the whole job that is done, and time left.

While a job is active, the bars of `reallm.system.progress` draw this line instead of lines of their own. Each part of a
stage, which is one bar, has an estimate of its seconds on some machine. Only their proportions matter: the time left is
scaled by what the finished work really took.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from tqdm import tqdm

from . import progress

AGAIN = 0.6
"""Share of what is left of a part that one bar covers, where the number of bars is not known (rounds of encoding)."""


class Job:
    """The parts of a job, and how much of each is done."""

    def __init__(self, stages: Mapping[str, Mapping[str, float]], repeated: frozenset[str] = frozenset()) -> None:
        """`stages` maps the name of each stage to its parts: the description of a bar -> estimated seconds.

        `repeated` are the parts that have an unknown number of bars.
        """
        self.stages, self.repeated = stages, repeated
        self.stage = next(iter(stages))
        self.parts = {desc: seconds for parts in stages.values() for desc, seconds in parts.items()}
        self.done = dict.fromkeys(self.parts, 0.0)
        """Part -> share that bars before the current one finished."""
        self._began, self._spent, self._worked = 0.0, 0.0, 0.0

    def begin_stage(self, name: str) -> None:
        """Everything before this stage is done."""
        self.stage = name
        for earlier in list(self.stages)[: self._number - 1]:
            self.done |= dict.fromkeys(self.stages[earlier], 1.0)

    @property
    def _number(self) -> int:
        return list(self.stages).index(self.stage) + 1

    def begin_part(self, desc: str) -> None:
        """A bar begins: the parts before it in its stage are done."""
        self._began = time.monotonic()
        parts = list(self.stages[self.stage])
        if desc in parts:
            self.done |= dict.fromkeys(parts[: parts.index(desc)], 1.0)

    def end_part(self, desc: str, share: float) -> None:
        """A bar has ended after `share` of its work."""
        if desc in self.parts:
            gained = self._gain(desc, share)
            self._spent += time.monotonic() - self._began
            self._worked += self.parts[desc] * gained
            self.done[desc] += gained

    def _gain(self, desc: str, share: float) -> float:
        return share * (AGAIN if desc in self.repeated else 1.0) * (1 - self.done[desc])

    def line(self, desc: str, share: float) -> str:
        """The line for a bar that has done `share` of its work."""
        gained = self._gain(desc, share) if desc in self.parts else 0.0
        now = self.parts.get(desc, 0.0) * gained
        total = sum(self.parts.values())
        done = sum(self.parts[part] * share for part, share in self.done.items()) + now
        spent, worked = self._spent + time.monotonic() - self._began, self._worked + now
        left = tqdm.format_interval((total - done) * spent / worked) if worked else "?"
        stage = f"[{self._number}/{len(self.stages)}] {self.stage}"
        return f"{stage}: {desc} {share:.0%} | job {done / total:.0%}, about {left} left"

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within the context, bars draw the line of this job."""
        progress.bar_maker = partial(JobBar, job=self)
        try:
            yield
        finally:
            progress.bar_maker = None


class JobBar(tqdm):  # type: ignore[type-arg]  # generic in its stubs only
    """A tqdm that draws the line of a job."""

    def __init__(self, *args: Any, job: Job, **settings: Any) -> None:
        self.job, self.terminal = job, sys.stderr.isatty()
        if not self.terminal:
            seconds = progress.LINE_SECONDS
            settings |= {"mininterval": seconds, "maxinterval": seconds, "miniters": 1}
        if not settings.get("disable"):
            job.begin_part(str(settings.get("desc")))
        super().__init__(*args, **settings)

    @property
    def share(self) -> float:
        """The share of this bar's work that is done."""
        return self.n / self.total if self.total else 1.0

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draw the line, or write it if standard error is a file and the first step has been made."""
        if self.terminal:
            self.fp.write(f"\r\x1b[K{self.job.line(self.desc, self.share)}")
        elif self.n > self.initial:
            self.fp.write(f"{self.job.line(self.desc, self.share)}\n")
        self.fp.flush()

    def clear(self, nolock: bool = False) -> None:
        """Remove the line from a terminal."""
        if self.terminal:
            self.fp.write("\r\x1b[K")

    def close(self) -> None:
        """Count the work of this bar."""
        if self.disable:
            return
        self.disable = True
        self._decr_instances(self)  # type: ignore[attr-defined]  # not in its stubs
        self.display()
        self.clear()
        self.job.end_part(self.desc, self.share)
