"""Workers on this machine: one process per pool (joblib's loky), so that the death of one process affects no other."""

from __future__ import annotations

import re
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

import joblib
from joblib.externals.loky.process_executor import BrokenProcessPool, ProcessPoolExecutor, TerminatedWorkerError

from .task import Task, TaskOutcome, Workers

IDLE_SECONDS = 300.0
"""Seconds after which a process without a task ends by itself, so that no process outlives a caller that was killed."""
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def local_workers(jobs: int) -> Workers:
    """Workers that run `jobs` tasks at once (-1: one per core). If only one is needed, it runs in this process."""
    count = joblib.cpu_count() if jobs < 0 else max(jobs, 1)
    return InProcessWorkers() if count == 1 else Processes(count)


class InProcessWorkers:
    """Runs one task at a time in this process."""

    slots = 1

    def __init__(self) -> None:
        self._started: list[Task[Any]] = []

    def start(self, task: Task[Any]) -> None:
        """Take `task`; it runs in `wait`."""
        self._started.append(task)

    def wait(self) -> TaskOutcome:
        """Run the task that was started."""
        task = self._started.pop()
        return TaskOutcome(task, task.call())

    def stop(self) -> None:
        """Do nothing: no task runs outside `wait`."""


class Processes:
    """Runs tasks in up to `slots` worker processes, each of which is started when it is first needed."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._pools: list[ProcessPoolExecutor] = []
        self._idle: list[ProcessPoolExecutor] = []
        self._busy: dict[Future[Any], tuple[Task[Any], ProcessPoolExecutor]] = {}

    def start(self, task: Task[Any]) -> None:
        """Start `task` in an idle process or a new one."""
        while self._idle:
            pool = self._idle.pop()
            try:
                self._busy[pool.submit(task.call)] = (task, pool)
            except BrokenProcessPool:  # the process was killed while idle
                self._end(pool)
            else:
                return
        pool = ProcessPoolExecutor(1, timeout=IDLE_SECONDS, env=ONE_THREAD)
        self._pools.append(pool)
        self._busy[pool.submit(task.call)] = (task, pool)

    def wait(self) -> TaskOutcome:
        """Wait until any process has finished its task or has died."""
        done, _ = wait(self._busy, return_when=FIRST_COMPLETED)
        future = done.pop()
        task, pool = self._busy.pop(future)
        try:
            result = future.result()
        except TerminatedWorkerError as error:
            self._end(pool)
            codes = re.search(r"\{(.+)\}", str(error))
            return TaskOutcome(task, death=codes[1] if codes else "no exit code")
        self._idle.append(pool)
        return TaskOutcome(task, result)

    def stop(self) -> None:
        """Kill all processes."""
        while self._pools:
            self._end(self._pools[-1])

    def _end(self, pool: ProcessPoolExecutor) -> None:
        pool.shutdown(kill_workers=True)
        self._pools.remove(pool)
