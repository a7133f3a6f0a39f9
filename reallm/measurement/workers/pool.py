"""Where tasks run: in this process, in worker processes of this machine, or on a Ray cluster, behind one interface.

A worker that dies loses the one task it was at, which is started again, RETRIES times at most. joblib's own backends do
not give that: its pool of processes breaks as a whole when one is killed, and Ray's (`ray.util.joblib`) fails the call
when one of its actors dies. So processes are pools of one, and the cluster gets plain Ray tasks.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar, get_args

from reallm.errors import UserError

from .task import Task, Workers

LOG = logging.getLogger(__name__)
Backend = Literal["processes", "ray"]
RETRIES = 3
R = TypeVar("R")


def run_all(workers: Workers, tasks: Iterable[Task[R]]) -> Iterator[R]:
    """Results in the order in which they come; one task more than are under way is drawn from `tasks`.

    Raises UserError, naming the task, when its worker has died 1 + RETRIES times.
    """
    source, deaths, under_way = iter(tasks), Counter[str](), 0
    ahead = next(source, None)
    while ahead is not None or under_way:
        while ahead is not None and under_way < workers.slots:
            workers.start(ahead)
            under_way += 1
            ahead = next(source, None)
        ended = workers.wait()
        if ended.death is None:
            under_way -= 1
            yield ended.result
            continue
        name = ended.task.name
        deaths[name] += 1
        if deaths[name] > RETRIES:
            what = f"{name}: its worker died {deaths[name]} times, at last with {ended.death} (out of memory?)"
            raise UserError(f"{what}; use fewer --jobs: the same command goes on where it stopped")
        LOG.warning("%s: its worker died (%s); started again, %d of %d", name, ended.death, deaths[name], RETRIES)
        workers.start(ended.task)


@contextmanager
def open_workers(backend: Backend, jobs: int, ray_address: str | None = None) -> Iterator[Workers]:
    """The workers of `backend`, which end with the context.

    `jobs` tasks at once; -1 for one a core of this machine, or of the cluster. One process is this very one. Raises
    UserError for a backend that is unknown, not installed or not there.
    """
    if backend not in get_args(Backend):
        raise UserError(f"--backend {backend}: expected {' or '.join(get_args(Backend))}")
    if ray_address is not None and backend != "ray":
        raise UserError(f"--ray-address {ray_address} is for --backend ray, not {backend}; leave one of them out")
    workers: Workers
    if backend == "ray":
        from .ray import connect

        workers = connect(ray_address, jobs)
    else:
        from .processes import local

        workers = local(jobs)
    try:
        yield workers
    finally:
        workers.stop()
