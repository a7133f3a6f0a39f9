"""A worker that dies does no harm: its task is run again, and the tasks of other workers are not affected.

The same tests run for processes of this machine and, where Ray is installed, for a cluster on this machine. Functions
that workers call are defined inside functions, so that they are pickled by value: a worker cannot import this file.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from clusters import local_cluster

from reallm.errors import UserError
from reallm.measurement.workers.pool import RETRIES, open_workers, run_all
from reallm.measurement.workers.task import Task, Workers

NEEDS_RAY = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install -e '.[ray]'")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A Ray cluster of two nodes of one core."""
    with local_cluster(2) as (cluster, _):
        yield cluster.address


@pytest.fixture(params=["here", "processes", pytest.param("ray", marks=NEEDS_RAY)])
def workers(request: pytest.FixtureRequest) -> Iterator[Workers]:
    """This process alone, and two workers of each backend."""
    if request.param == "ray":
        with open_workers("ray", 2, request.getfixturevalue("address")) as opened:
            yield opened
        return
    with open_workers("processes", 1 if request.param == "here" else 2) as opened:
        yield opened


@pytest.fixture(params=["processes", pytest.param("ray", marks=NEEDS_RAY)])
def mortal(request: pytest.FixtureRequest) -> Iterator[Workers]:
    """Two workers that a test may kill."""
    where = request.getfixturevalue("address") if request.param == "ray" else None
    with open_workers(request.param, 2, where) as opened:
        yield opened


def marking(folder: Path, name: str, deaths: int = 0) -> Task[str]:
    """A task that writes a file on each start, kills its process the first `deaths` times, and then returns `name`."""

    def call() -> str:
        begun = len(list(folder.glob(f"{name}-*")))
        (folder / f"{name}-{begun}").touch()
        if begun < deaths:
            os.kill(os.getpid(), signal.SIGKILL)
        return name

    return Task(name, call)


def begun(folder: Path, name: str) -> int:
    return len(list(folder.glob(f"{name}-*")))


def test_every_task_is_done_once(workers: Workers, tmp_path: Path) -> None:
    names = [f"task{i}" for i in range(7)]
    assert sorted(run_all(workers, (marking(tmp_path, name) for name in names))) == names
    assert all(begun(tmp_path, name) == 1 for name in names)


def test_no_tasks_give_no_results(workers: Workers) -> None:
    assert list(run_all(workers, [])) == []


def test_tasks_are_drawn_as_workers_come_free(workers: Workers, tmp_path: Path) -> None:
    """A task's weight is written to disk when the task is drawn, so at most one task more than are running is drawn."""
    drawn: list[str] = []

    def tasks() -> Iterator[Task[str]]:
        for i in range(9):
            drawn.append(f"task{i}")
            yield marking(tmp_path, drawn[-1])

    for done, _ in enumerate(run_all(workers, tasks())):
        assert len(drawn) <= done + 1 + workers.slots + 1


def test_an_exception_of_a_task_is_raised_unchanged(workers: Workers) -> None:
    def call() -> None:
        raise OSError(28, "No space left on device", "/the/place")

    with pytest.raises(OSError, match="No space left") as caught:
        list(run_all(workers, [Task("full", call)]))
    assert type(caught.value) is OSError and (caught.value.errno, caught.value.filename) == (28, "/the/place")


def test_a_worker_that_dies_loses_only_its_task(
    mortal: Workers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The other worker runs a long task throughout, which must be started once only, and end."""
    last_ran = tmp_path / "over"

    def long() -> str:
        (tmp_path / f"long-{time.monotonic_ns()}").touch()
        while not last_ran.exists():
            time.sleep(0.01)
        return "long"

    def last() -> str:
        last_ran.touch()
        return "last"

    frail = [marking(tmp_path, f"frail{i}", deaths=i) for i in range(3)]
    results = list(run_all(mortal, [Task("long", long), *frail, Task("last", last)]))
    assert sorted(results) == ["frail0", "frail1", "frail2", "last", "long"]
    assert [begun(tmp_path, name) for name in ("long", "frail0", "frail1", "frail2")] == [1, 1, 2, 3]
    assert sum("its worker died" in line and "frail2" in line for line in caplog.messages) == 2


def test_a_task_that_always_kills_its_worker_is_named(mortal: Workers, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^bad: its worker died {1 + RETRIES} times.*use fewer --jobs"):
        list(run_all(mortal, [marking(tmp_path, "good"), marking(tmp_path, "bad", deaths=99)]))
    assert begun(tmp_path, "bad") == 1 + RETRIES


def test_a_process_killed_while_idle_is_replaced(tmp_path: Path) -> None:
    def pid() -> int:
        return os.getpid()

    with open_workers("processes", 2) as workers:
        first = list(run_all(workers, [Task("a", pid)]))
        os.kill(first[0], signal.SIGKILL)
        while psutil.pid_exists(first[0]) and psutil.Process(first[0]).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        second = list(run_all(workers, [Task("b", pid)]))
    assert second != first


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
def test_stopping_leaves_no_process(stop: type[BaseException], tmp_path: Path) -> None:
    def sleep() -> None:
        time.sleep(600)

    def pid() -> int:
        return os.getpid()

    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises(stop), open_workers("processes", 2) as workers:
        for _ in run_all(workers, [Task("pid", pid), Task("sleep", sleep), Task("sleep", sleep)]):
            raise stop
    left = [c for c in psutil.Process().children(recursive=True) if c.pid not in before]
    assert not [c for c in left if "popen_loky" in " ".join(c.cmdline())]


@NEEDS_RAY
def test_a_cluster_that_cannot_be_reached_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match=r"^no Ray cluster at 127\.0\.0\.1:1 .*ray start --head"):
        with_ray("127.0.0.1:1")


def with_ray(address: str | None) -> None:
    with open_workers("ray", 1, address):
        pass


def test_without_ray_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        UserError, match=r"^--backend ray needs Ray, which is not installed; pip install 'reallm\[ray\]'$"
    ):
        with_ray(None)


def test_options_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(UserError, match="--backend dask: expected processes or ray"), open_workers("dask", 1):  # type: ignore[arg-type]
        pass
    with (
        pytest.raises(UserError, match="--ray-address here:1 is for --backend ray"),
        open_workers("processes", 1, "here:1"),
    ):
        pass
