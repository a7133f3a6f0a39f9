"""Workers on a Ray cluster: each task is a plain Ray task on one core of any machine that is free."""

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
    """Connect to the cluster at `address`, at RAY_ADDRESS, or the one that this machine belongs to.

    If this process is already connected, that connection is used. Raises UserError if Ray is not installed or no
    cluster is found.
    """
    try:
        import ray
    except ImportError:
        raise UserError("--backend ray needs Ray, which is not installed; pip install 'reallm[ray]'") from None
    connects = not ray.is_initialized()
    if connects:
        address = address or os.environ.get("RAY_ADDRESS") or "auto"
        try:
            _check_reachable(address)
            ray.init(address, logging_level=logging.WARNING)
        except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UserError(f"no Ray cluster at {address} ({reason}); {WAY_OUT}") from None
    return RayWorkers(jobs, disconnect=connects)


def _check_reachable(address: str) -> None:
    """Raise OSError or ValueError if nothing listens at `address`, HOST:PORT; Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon:
        socket.create_connection((host, int(port)), timeout=10).close()


def _call(call: Callable[[], Any]) -> Any:
    return call()


class RayWorkers:
    """Runs tasks on a cluster: at most `jobs` at the same time or, if `jobs` is negative, two per core of the cluster.

    With two per core, half of the tasks wait in Ray's queue, so that no core is idle between tasks. `disconnect` says
    whether `stop` closes the connection to the cluster.
    """

    def __init__(self, jobs: int, disconnect: bool) -> None:
        import ray

        self._ray, self._jobs, self._disconnect = ray, jobs, disconnect
        self._remote = ray.remote(num_cpus=1, max_retries=0, scheduling_strategy="SPREAD")(_call)
        self._deaths = (
            ray.exceptions.WorkerCrashedError,
            ray.exceptions.NodeDiedError,
            ray.exceptions.OutOfMemoryError,
            ray.exceptions.ObjectLostError,  # the result was lost with the machine that held it
        )
        self._running: dict[Any, Task[Any]] = {}
        if not self._cores():
            LOG.warning("the Ray cluster has no free core yet: waiting for machines to join it")

    def _cores(self) -> int:
        return int(self._ray.cluster_resources().get("CPU", 0))

    @property
    def slots(self) -> int:
        """The number of tasks that may run at the same time now; it changes as machines join and leave."""
        return 2 * max(self._cores(), 1) if self._jobs < 0 else max(self._jobs, 1)

    def start(self, task: Task[Any]) -> None:
        """Submit `task` to the cluster."""
        self._running[self._remote.remote(task.call)] = task

    def wait(self) -> TaskOutcome:
        """Wait until any task has finished or has lost its worker or machine."""
        (reference, *_), _ = self._ray.wait(list(self._running), num_returns=1)
        task = self._running.pop(reference)
        try:
            return TaskOutcome(task, self._ray.get(reference))
        except self._ray.exceptions.RayTaskError as error:
            raise _original_error(error) from error
        except self._deaths as error:
            return TaskOutcome(task, death=f"{type(error).__name__}: {str(error).splitlines()[0]}".rstrip(": "))

    def stop(self) -> None:
        """Cancel the running tasks, and close the connection if `disconnect` says so; the cluster keeps running."""
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()
        if self._disconnect:
            self._ray.shutdown()


def _original_error(error: Any) -> BaseException:
    """The exception that a task raised, without Ray's wrapper around it."""
    cause = error.cause
    if "failed to import" in str(cause) or isinstance(cause, ModuleNotFoundError):
        what = str(cause).strip().splitlines()[-1]
        return UserError(f"a Ray worker cannot import what it needs ({what}); install the same reallm on every machine")
    return cause if isinstance(cause, BaseException) else RuntimeError(str(error))
