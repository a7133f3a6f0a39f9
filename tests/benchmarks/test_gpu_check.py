"""The check of a GPU: without one it says so; with one, every part is in the file, whatever becomes of it."""

from __future__ import annotations

import ast
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import DEVICE_TESTS, PARTS, TOTAL_SECONDS, Part, check, main
from benchmarks.gpu_search import compare

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, seconds: float = 60, results: Path | None = None) -> Part:
    return Part(code[:20], (sys.executable, "-c", code), seconds, {"WORD": "good"}, results)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_check, "check", lambda *_arguments: pytest.fail("something was run"))
    assert main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "finds no CUDA GPU" in lines[0]


def test_every_part_is_kept_whatever_becomes_of_it(tmp_path: Path) -> None:
    figures, old = tmp_path / "figures.json", tmp_path / "old.json"
    old.write_text("[0]")
    half = f"open({str(figures)!r}, 'w').write('[1, 2]'); print('half'); raise SystemExit('no peers')"
    parts = [
        python("import os; print(os.environ['WORD'])"),
        python(half, 60, figures),
        python("import time; print('started', flush=True); time.sleep(600)", 3),
        Part("nothing", (str(tmp_path / "absent"),), 60),
        python("print('as before')", 60, old),
    ]
    os.utime(old, (1, 1))
    outcomes = check(parts, tmp_path / "check.json")
    kept = json.loads((tmp_path / "check.json").read_text())
    assert [part["name"] for part in kept["parts"]] == [part.name for part in parts]
    assert kept["machine"]["torch"] == torch.__version__
    assert [outcome.status for outcome in outcomes[:3]] == ["passed", "failed (exit code 1)", "timed out after 3 s"]
    assert outcomes[0].output.strip() == "good"
    assert outcomes[1].figures == [1, 2] and "no peers" in outcomes[1].output and "half" in outcomes[1].output
    assert "started" in outcomes[2].output and outcomes[2].seconds < 30
    assert outcomes[3].status.startswith("failed: ") and "absent" in outcomes[3].status
    assert outcomes[4].status == "passed" and outcomes[4].figures is None  # an earlier run's figures


def test_parts_for_which_no_time_is_left_are_named(tmp_path: Path) -> None:
    outcomes = check([python("print(1)"), python("print(2)")], tmp_path / "check.json", seconds=0.5)
    assert [outcome.status for outcome in outcomes] == ["not started: no time left"] * 2


def test_a_part_that_does_not_pass_is_the_exit_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path / "check.json")
    monkeypatch.setattr(gpu_check, "PARTS", [python("print(1)")])
    assert main() == 0
    monkeypatch.setattr(gpu_check, "PARTS", [python("raise SystemExit(3)"), python("print(1)")])
    assert main() == 1
    kept = json.loads((tmp_path / "check.json").read_text())
    assert kept["machine"]["gpu"] == "a GPU"
    assert [part["status"] for part in kept["parts"]] == ["failed (exit code 3)", "passed"]


def test_the_limits_fit_into_eight_minutes_and_the_commands_exist() -> None:
    assert sum(part.seconds for part in PARTS) <= TOTAL_SECONDS <= 470
    for part in PARTS:
        names = [word.removeprefix("benchmarks.") for word in part.command if word.startswith("benchmarks.")]
        assert all((ROOT / "benchmarks" / f"{name}.py").exists() for name in names)


def test_every_test_that_needs_a_gpu_is_listed() -> None:
    needed = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        if "needs a CUDA device" not in text or path == Path(__file__):
            continue
        where = path.relative_to(ROOT).as_posix()
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
                needed.add(where)
            marks = [ast.unparse(mark) for mark in getattr(node, "decorator_list", ())]
            if isinstance(node, ast.FunctionDef) and any("needs a CUDA" in m or m == "needs_gpu" for m in marks):
                needed.add(f"{where}::{node.name}")
    assert needed == set(DEVICE_TESTS)


def test_the_search_is_compared_with_itself_on_the_cpu() -> None:
    plain, with_feedback = (compare(8, 4, feedback, "cpu", shared=2, many=3) for feedback in (False, True))
    assert plain.same_tiles == with_feedback.same_tiles == 1
    assert plain.error_ratio == 1 and with_feedback.error_ratio is None
    assert plain.weights_per_second > 0 and with_feedback.weights_per_second_together
