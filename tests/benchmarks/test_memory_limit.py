"""The memory limit of benchmarks is enforced, and what it measures is right."""

from __future__ import annotations

import sys

import pytest

from benchmarks.memory_limit import MemoryLimit

MIB = 1 << 20


@pytest.fixture
def limit():
    try:
        return MemoryLimit(200 * MIB)
    except OSError as error:
        pytest.skip(f"this machine does not let us make a control group: {error}")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_process_that_needs_more_is_killed_and_one_that_needs_less_is_measured(limit):
    assert limit.run(python(f"bytearray({400 * MIB})"), None, lambda: None).returned == -9
    run = limit.run(python(f"import time; x = bytearray({100 * MIB}); time.sleep(1)"), None, lambda: None)
    assert run.returned == 0 and not run.killed and 100 * MIB <= run.peak_bytes < 200 * MIB


def test_a_command_is_killed_when_asked(limit):
    polled = []
    run = limit.run(python("import time; time.sleep(60)"), lambda: len(polled) >= 2, lambda: polled.append(1))
    assert run.killed and run.returned == -9 and run.seconds < 30
