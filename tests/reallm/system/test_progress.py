"""Progress in a log file: whole lines, few of them, and a last one that is complete."""

from __future__ import annotations

import sys

import pytest

from reallm.system import progress
from reallm.system.progress import progress_bar


def test_a_log_file_gets_one_whole_line_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress_bar(range(1000), desc="count", unit="window")) == list(range(1000))
    written = capsys.readouterr().err
    assert "\r" not in written
    (line,) = written.splitlines()
    assert line.startswith("count: 100%") and "1000/1000" in line


def test_lines_come_no_faster_than_their_interval(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with progress_bar(total=3, desc="count") as bar:
        for _ in range(3):
            bar.update()
    assert [line.split("|")[0].split("[")[0].strip() for line in capsys.readouterr().err.splitlines()] == [
        "count:  33% 1/3",
        "count:  67% 2/3",
        "count: 100% 3/3",
        "count: 100% 3/3",
    ]


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    list(progress_bar(range(3), desc="count"))
    assert "\r" in capsys.readouterr().err


def test_nothing_is_written_when_disabled(capsys: pytest.CaptureFixture[str]) -> None:
    list(progress_bar(range(3), desc="count", disable=True))
    assert not capsys.readouterr().err
