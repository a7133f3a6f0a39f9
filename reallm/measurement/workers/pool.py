"""Running tasks on workers of either backend, with retries when a worker dies.

When a worker dies, only its current task is lost; the task is run again, up to RETRIES times. joblib's backends cannot
do this: joblib's process pool breaks as a whole when one process is killed, and `ray.util.joblib` fails the whole call
when one of its actors dies. So each local process is a separate pool, and the cluster runs plain Ray tasks.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

from reallm.errors import UserError

from .task import Task, Workers

if TYPE_CHECKING:
    import torch

LOG = logging.getLogger(__name__)
Backend = Literal["processes", "ray"]
RETRIES = 3
GPU_JOBS = 16
"""Default number of matrices encoded at the same time with a GPU; see `codecs.trellis.device_search`."""
R = TypeVar("R")


def run_all(workers: Workers, tasks: Iterable[Task[R]]) -> Iterator[R]:
    """Run all tasks and yield their results in the order in which the tasks end.

    `tasks` is read lazily, at most one task ahead of those that are running. Exceptions of a task are raised here.
    Raises UserError, with the name of the task, when the workers of a task have died 1 + RETRIES times.
    """
    source, deaths, running = iter(tasks), Counter[str](), 0
    following = next(source, None)
    while following is not None or running:
        while following is not None and running < workers.slots:
            workers.start(following)
            running += 1
            following = next(source, None)
        outcome = workers.wait()
        if outcome.death is None:
            running -= 1
            yield outcome.result
            continue
        name = outcome.task.name
        deaths[name] += 1
        if deaths[name] > RETRIES:
            what = f"{name}: its worker died {deaths[name]} times, the last time with {outcome.death} (out of memory?)"
            raise UserError(f"{what}; use fewer --jobs: the same command resumes where it stopped")
        LOG.warning("%s: its worker died (%s); retry %d of %d", name, outcome.death, deaths[name], RETRIES)
        workers.start(outcome.task)


@contextmanager
def open_workers(
    backend: Backend, jobs: int, ray_address: str | None = None, gpu: torch.device | None = None
) -> Iterator[Workers]:
    """Start the workers of `backend`; they are stopped when the context ends.

    `jobs` tasks run at the same time; -1 means one per core of this machine or of the cluster. With one local job, the
    tasks run in this process. `ray_address` may be given only with the backend "ray". With `gpu`, tasks run in threads
    of this process, so that they share that GPU. Raises UserError for a backend that is unknown, not installed or not
    reachable.
    """
    if backend not in get_args(Backend):
        raise UserError(f"--backend {backend}: expected {' or '.join(get_args(Backend))}")
    if ray_address is not None and backend != "ray":
        raise UserError(f"--ray-address {ray_address} is for --backend ray, not {backend}; leave one of them out")
    if gpu is not None and backend == "ray":
        raise UserError(f"--device {gpu} is for --backend processes, not ray; leave one of them out")
    workers: Workers
    if gpu is not None:
        from .threads import Threads

        workers = Threads(jobs if jobs > 0 else GPU_JOBS, gpu)
    elif backend == "ray":
        from .ray import connect

        workers = connect(ray_address, jobs)
    else:
        from .processes import local_workers

        workers = local_workers(jobs)
    try:
        yield workers
    finally:
        workers.stop()
