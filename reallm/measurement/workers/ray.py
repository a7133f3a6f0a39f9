"""Workers of a Ray cluster: a plain Ray task each, on one core of whichever machine is free."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from typing import Any

from reallm.errors import UserError

from .task import Task, TaskOutcome

LOG = logging.getLogger(__name__)
WAY_OUT = "start one with `ray start --head`, or name one by --ray-address or RAY_ADDRESS"


def connect(address: str | None, jobs: int) -> RayWorkers:
    """The cluster at `address`, at RAY_ADDRESS, or the one this machine belongs to; an open connection is used as is.

    Raises UserError when Ray is not installed or no cluster is there.
    """
    try:
        import ray
    except ImportError:
        raise UserError("--backend ray needs Ray, which is not installed; pip install 'reallm[ray]'") from None
    own = not ray.is_initialized()
    if own:
        place = address or os.environ.get("RAY_ADDRESS") or "auto"
        try:
            _knock(place)
            ray.init(place, logging_level=logging.WARNING)
        except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UserError(f"no Ray cluster at {place} ({reason}); {WAY_OUT}") from None
    return RayWorkers(jobs, own)


def _knock(place: str) -> None:
    """Raise OSError or ValueError where nothing listens at HOST:PORT: Ray itself would try for minutes."""
    host, colon, port = place.removeprefix("ray://").rpartition(":")
    if colon:
        socket.create_connection((host, int(port)), timeout=10).close()


def _call(call: Callable[[], Any]) -> Any:
    return call()


class RayWorkers:
    """Tasks on a cluster, at most `jobs` under way, or twice its cores for a negative number (so that none waits)."""

    def __init__(self, jobs: int, own: bool) -> None:
        import ray

        self._ray, self._jobs, self._own = ray, jobs, own
        self._remote = ray.remote(num_cpus=1, max_retries=0, scheduling_strategy="SPREAD")(_call)
        found = ray.exceptions
        self._deaths = (
            found.WorkerCrashedError,
            found.NodeDiedError,
            found.OutOfMemoryError,
            found.ObjectLostError,  # the result, with the machine that held it
        )
        self._busy: dict[Any, Task[Any]] = {}
        if not self._cores():
            LOG.warning("the Ray cluster has no free core yet: waiting for machines to join it")

    def _cores(self) -> int:
        return int(self._ray.cluster_resources().get("CPU", 0))

    @property
    def slots(self) -> int:
        """As machines come and go."""
        return 2 * max(self._cores(), 1) if self._jobs < 0 else max(self._jobs, 1)

    def start(self, task: Task[Any]) -> None:
        """Hand `task` to the cluster."""
        self._busy[self._remote.remote(task.call)] = task

    def wait(self) -> TaskOutcome:
        """Until the cluster is done with any task, or has lost its worker or machine."""
        (ended, *_), _ = self._ray.wait(list(self._busy), num_returns=1)
        task = self._busy.pop(ended)
        try:
            return TaskOutcome(task, self._ray.get(ended))
        except self._ray.exceptions.RayTaskError as error:
            raise _raised(error) from error
        except self._deaths as error:
            return TaskOutcome(task, death=f"{type(error).__name__}: {str(error).splitlines()[0]}".rstrip(": "))

    def stop(self) -> None:
        """Kill what is under way, and leave the cluster as it was."""
        for reference in self._busy:
            self._ray.cancel(reference, force=True)
        self._busy.clear()
        if self._own:
            self._ray.shutdown()


def _raised(error: Any) -> BaseException:
    """What a task raised, without Ray's wrapping."""
    cause = error.cause
    if "failed to import" in str(cause) or isinstance(cause, ModuleNotFoundError):
        what = str(cause).strip().splitlines()[-1]
        return UserError(f"a Ray worker cannot import what it needs ({what}); install the same reallm on every machine")
    return cause if isinstance(cause, BaseException) else RuntimeError(str(error))
