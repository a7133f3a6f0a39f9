"""The interface between tasks and the workers that run them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

R = TypeVar("R")


@dataclass(frozen=True)
class Task(Generic[R]):
    """A call for a worker: it must be picklable, and running it twice must do no harm."""

    name: str
    """The name of the task in messages."""
    call: Callable[[], R]


@dataclass(frozen=True)
class TaskOutcome:
    """How a task ended: with a result, or with the death of its worker."""

    task: Task[Any]
    result: Any = None
    death: str | None = None
    """Why the worker died, such as a signal; None if there is a result."""


class Workers(Protocol):
    """A set of workers that run tasks."""

    @property
    def slots(self) -> int:
        """The number of tasks that may run at the same time now."""

    def start(self, task: Task[Any]) -> None:
        """Start `task`; fewer than `slots` tasks must be running."""

    def wait(self) -> TaskOutcome:
        """Wait until any task ends, and return how it ended; if it raised an exception, that is raised here."""

    def stop(self) -> None:
        """Stop all workers immediately, including those that are running a task."""
