"""Workers in threads of this process, for a GPU: kernels of several tasks run on it at the same time.

Kernels of different processes take turns on a GPU, those of different streams of one process do not. When the GPU's
memory is too small for the tasks that are running, fewer run at the same time from then on.
"""

from __future__ import annotations

import logging
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import Any

import torch

from .task import Task, TaskOutcome

LOG = logging.getLogger(__name__)


class Threads:
    """Runs up to `slots` tasks at once, each in its own stream of the GPU `device`."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self.slots, self.device = slots, device
        self._pool = ThreadPoolExecutor(slots)
        self._running: dict[Future[Any], Task[Any]] = {}
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)  # results must not depend on the number of tasks that run

    def start(self, task: Task[Any]) -> None:
        """Start `task` in a thread."""
        self._running[self._pool.submit(self._run, task)] = task

    def wait(self) -> TaskOutcome:
        """Wait until any task ends. One that the GPU's memory was too small for counts as a worker that died."""
        done, _ = wait(self._running, return_when=FIRST_COMPLETED)
        future = done.pop()
        task = self._running.pop(future)
        try:
            return TaskOutcome(task, future.result())
        except torch.OutOfMemoryError:
            self.slots = max(1, self.slots // 2)
            LOG.warning("the GPU is out of memory; encoding %d at the same time", self.slots)
            return TaskOutcome(task, death="the GPU out of memory")

    def stop(self) -> None:
        """Wait for the running tasks, because threads cannot be stopped; start no others."""
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)

    def _run(self, task: Task[Any]) -> Any:
        with ExitStack() as stack:
            if self.device.type == "cuda":
                stack.enter_context(torch.cuda.device(self.device))
                stack.enter_context(torch.cuda.stream(torch.cuda.Stream(self.device)))  # type: ignore[no-untyped-call]  # torch: untyped
            try:
                return task.call()
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                raise
