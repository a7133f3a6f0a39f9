"""The demo: which stages it runs, which it skips in a second run, and its messages when it cannot start."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console
from strategies import make_table

from reallm.cli import demo as module
from reallm.cli.demo import Stage, StageError, demo, fetch_model, run_stage
from reallm.compressing.result import Compressed
from reallm.errors import UserError
from reallm.evaluation.compare import Comparison, Divergence
from reallm.evaluation.evaluate import Evaluation
from reallm.models.sizes import Sizes
from reallm.planner.tables.measured_table import TABLE_FILE
from reallm.planner.tables.records import write_record
from reallm.planning.plan import plan

EVERY_STAGE = ["compress", "generate"]


def compressing(folder: Path) -> list[list[str]]:
    """The arguments of `compress` at two budgets."""
    return [
        arguments
        for budget in ("48MiB", "4.0bpw")
        for name, arguments in module._commands(folder, folder / "model.gguf", budget, None, None, "quick")
        if name == "compress"
    ]


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the stages that ran; adding "fail NAME" to the list makes that stage fail."""
    names: list[str] = []

    def record(name: str, arguments: Sequence[str], keep_output: bool = False) -> Stage:
        if f"fail {name}" in names:
            raise StageError(2)
        names.append(name)
        return Stage(name, list(arguments), 1.0, 1 << 20, "words" if keep_output else "")

    monkeypatch.setattr(module, "run_stage", record)
    monkeypatch.setattr(module, "fetch_model", lambda folder, console: folder / "model.gguf")
    monkeypatch.setattr(module, "_print_summary", lambda folder, stages, console: None)
    return names


def test_a_second_run_repeats_nothing(ran: list[str], tmp_path: Path, console: Console) -> None:
    demo(tmp_path, console=console)
    assert ran == EVERY_STAGE
    demo(tmp_path, console=console)
    assert ran == EVERY_STAGE


def test_another_budget_continues_in_the_same_work_folder(ran: list[str], tmp_path: Path, console: Console) -> None:
    demo(tmp_path, console=console)
    ran.clear()
    demo(tmp_path, budget="4.0bpw", console=console)
    assert ran == EVERY_STAGE
    works = {tuple(arguments[arguments.index("--work") :][:2]) for arguments in compressing(tmp_path)}
    assert works == {("--work", str(tmp_path / "work"))}


def test_a_failed_stage_ends_the_demo_and_the_next_run_begins_there(
    ran: list[str], tmp_path: Path, console: Console
) -> None:
    ran.append("fail generate")
    with pytest.raises(StageError) as failure:
        demo(tmp_path, console=console)
    assert failure.value.code == 2
    ran.clear()
    demo(tmp_path, console=console)
    assert ran == EVERY_STAGE[1:]


def test_a_damaged_record_of_stages_is_ignored(ran: list[str], tmp_path: Path, console: Console) -> None:
    demo(tmp_path, console=console)
    (tmp_path / module.STAGES_FILE).write_text('[{"name": "mea')
    ran.clear()
    demo(tmp_path, console=console)
    assert ran == EVERY_STAGE


def test_every_command_of_the_demo_is_one_that_reallm_has(tmp_path: Path) -> None:
    """Run as far as the missing model or folder: a misspelt option would end in a usage message instead."""
    commands = module._commands(tmp_path, tmp_path / "no.gguf", "3.0bpw", "no.txt", "no.txt", "quick")
    assert [name for name, _ in commands] == EVERY_STAGE
    for _, arguments in commands:
        with pytest.raises(StageError) as failure:
            run_stage("stage", arguments)
        assert failure.value.code == 2


def test_a_stage_reports_its_own_memory_and_words() -> None:
    stage = run_stage("version", ["--version"], keep_output=True)
    assert stage.output.startswith("reallm ")
    assert 1 << 20 < stage.peak_rss_bytes < 1 << 34
    assert stage.seconds > 0


def test_a_damaged_model_file_is_refused(tmp_path: Path, console: Console) -> None:
    (tmp_path / module.MODEL_FILE).write_bytes(b"GGUF and nothing else")
    with pytest.raises(UserError, match=r"Q4_1\.gguf is damaged .*delete it"):
        fetch_model(tmp_path, console)


def test_a_failing_download_says_what_to_do(tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found\n")

    monkeypatch.setattr(subprocess, "run", offline)
    with pytest.raises(UserError, match=r"pip cannot download .*No matching distribution.*check the connection"):
        fetch_model(tmp_path, console)
    assert list(tmp_path.iterdir()) == []


def test_it_opens_with_every_stage_and_its_duration(ran: list[str], tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    demo(tmp_path, console=console)
    assert isinstance(console.file, io.StringIO)
    opening = console.file.getvalue().partition("$ reallm")[0]
    assert module.DEMO_BUDGET in opening and all(name in opening for name in EVERY_STAGE)
    assert all(duration in opening for _, duration in module.STAGES.values())


def test_the_summary_shows_stages_and_what_compress_wrote(tmp_path: Path) -> None:
    """The result is written as `compress` writes it, so that a renamed field is noticed here."""
    table = make_table(("block.0.up", 64, 64, "linear", {"int4-g64": 0.1, "int8-g64": 0.001}))
    write_record(tmp_path / TABLE_FILE, table)
    chosen = plan(tmp_path, budget="8bpw")
    divergence = Divergence(0.1234, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.875)
    comparison = Comparison(8, 1024, 8184, 35.5, 29.25, divergence)
    small, large = Sizes(100, 200, 300, 400, 4 << 20), Sizes(100, 200, 8 << 20, 400, 9 << 20)
    found = Evaluation("out", "m", "text.txt", "0", "float32", comparison, small, large, 1.0, 1, (), {})
    made = Compressed(tmp_path / "out", tmp_path, table, chosen, found, {"measure": 50.0}, 40.0, {"measure": 1 << 30})
    (tmp_path / module.RESULT_FILE).write_text(made.to_json())
    console = Console(file=io.StringIO(), width=200)
    stages = [Stage("compress", [], 61.5, 2 << 30, ""), Stage("generate", [], 2.5, 1 << 20, "Paris.")]
    module._print_summary(tmp_path, stages, console)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    for part in (
        "61.5",
        "64.0",
        "2.00 GiB",
        "9.00 MiB",
        "4.00 MiB",
        "29.25",
        "35.50",
        "0.123",
        "87.5%",
        "Paris.",
        "8bpw",
    ):
        assert part in shown, part
