"""A task, its outcome, and the interface of whatever runs tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

R = TypeVar("R")


@dataclass(frozen=True)
class Task(Generic[R]):
    """A call that a worker can make: picklable, and harmless when made twice."""

    name: str
    """What the user knows it by."""
    call: Callable[[], R]


@dataclass(frozen=True)
class TaskOutcome:
    """A task that is no longer under way."""

    task: Task[Any]
    result: Any = None
    death: str | None = None
    """How its worker died; then there is no result."""


class Workers(Protocol):
    """What runs tasks."""

    @property
    def slots(self) -> int:
        """How many tasks may be under way now."""

    def start(self, task: Task[Any]) -> None:
        """Begin `task`."""

    def wait(self) -> TaskOutcome:
        """Until any task ends; raises what the task raised."""

    def stop(self) -> None:
        """End everything at once, whatever is under way."""
