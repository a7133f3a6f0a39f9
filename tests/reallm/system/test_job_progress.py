"""One line for a job of several stages: the stage, the share of everything, and the time left."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

import pytest

from reallm.system import job_progress, progress
from reallm.system.job_progress import Job
from reallm.system.memory import peak_rss_bytes, reset_peak_rss
from reallm.system.progress import progress_bar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which tests set, and lines at every step."""
    now = [0.0]
    monkeypatch.setattr(job_progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    return now


def work(job: Job, clock: list[float], desc: str, steps: int, seconds: float) -> None:
    with job.active(), progress_bar(total=steps, desc=desc) as bar:
        for _ in range(steps):
            clock[0] += seconds
            bar.update()


def shares(written: str) -> Iterator[int]:
    for line in written.splitlines():
        found = re.search(r"job (\d+)%", line)
        assert found, line
        yield int(found[1])


def test_a_line_has_the_stage_the_share_of_the_job_and_the_time_left(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job({"first": {"a": 10.0, "b": 30.0}, "second": {"c": 40.0}})
    work(job, clock, "a", 2, 10.0)  # twice as long as estimated
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "[1/2] first: a 50% | job 6%, about 02:30 left"
    work(job, clock, "b", 3, 20.0)
    assert capsys.readouterr().err.splitlines()[-1] == "[1/2] first: b 100% | job 50%, about 01:20 left"
    job.begin_stage("second")
    work(job, clock, "c", 1, 80.0)
    assert capsys.readouterr().err.splitlines()[-1] == "[2/2] second: c 100% | job 100%, about 00:00 left"


def test_parts_that_an_earlier_run_did_count_as_done_but_not_as_fast(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job({"first": {"a": 10.0, "b": 30.0}, "second": {"c": 40.0}})
    work(job, clock, "b", 1, 30.0)
    assert capsys.readouterr().err.splitlines()[-1].endswith("job 50%, about 00:40 left")


def test_rounds_of_unknown_number_never_go_back(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    job = Job({"only": {"a": 10.0, "b": 10.0}}, repeated=frozenset({"a"}))
    for _ in range(5):
        work(job, clock, "a", 2, 1.0)
    work(job, clock, "b", 2, 1.0)
    found = list(shares(capsys.readouterr().err))
    assert found == sorted(found) and found[-1] == 100
    assert found[1] == 30


def test_other_bars_are_shown_without_counting(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    job = Job({"only": {"a": 10.0}})
    work(job, clock, "surprise", 1, 1.0)
    assert capsys.readouterr().err.splitlines()[-1] == "[1/1] only: surprise 100% | job 0%, about ? left"


def test_a_terminal_gets_one_line_that_is_removed_at_the_end(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    work(Job({"only": {"a": 10.0}}), clock, "a", 3, 1.0)
    written = capsys.readouterr().err
    assert "\n" not in written and written.endswith("\r\x1b[K") and "job 100%" in written


def test_after_the_job_bars_are_their_own_again(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    work(Job({"only": {"a": 10.0}}), clock, "a", 1, 1.0)
    capsys.readouterr()
    list(progress_bar(range(3), desc="count"))
    assert capsys.readouterr().err.splitlines()[-1].startswith("count: 100%")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the peak")
def test_the_peak_of_a_stage_is_its_own() -> None:
    before = peak_rss_bytes()
    block = bytearray(1 << 28)
    block[::4096] = b"x" * len(block[::4096])
    assert peak_rss_bytes() >= before + (1 << 27)
    del block
    reset_peak_rss()
    assert peak_rss_bytes() < before + (1 << 27)
