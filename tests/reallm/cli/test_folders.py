"""Folders as users have them: commands from elsewhere, moved folders, names with spaces, outputs that are taken."""

from __future__ import annotations

import errno
import os
import random
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from strategies import make_table
from tiny import save_tiny
from typer.testing import CliRunner, Result

import reallm
from reallm.cli.main import app
from reallm.errors import UserError
from reallm.planner.tables.measured_table import TABLE_FILE
from reallm.planner.tables.plan import Plan, read_plan
from reallm.planner.tables.records import write_record
from reallm.planning.plan import plan as make_plan

pytestmark = pytest.mark.usefixtures("one_thread")
ODD = "ä [bold] b"
"""A name with a space, a letter beyond ASCII, and what would be markup in a rich table."""


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments: str | Path) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, f"{result.stderr} {result.exception!r}"
    return result


def refusal(*arguments: str | Path) -> str:
    """The one line on stderr of a command that must end with exit code 2."""
    result = run(*arguments)
    assert result.exit_code == 2, f"{result.exit_code}: {result.output} {result.exception!r}"
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("reallm: ")]
    return line


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an odd name in which a tiny model was measured, planned and compiled, all by relative paths."""
    base = tmp_path_factory.mktemp("job") / ODD
    save_tiny("llama", base / "model", dtype=torch.bfloat16)
    (base / "text.txt").write_text("".join(random.Random(0).choices("abcdefgh ", k=3000)), encoding="utf-8")
    (base / "space.yaml").write_text("linear: [int4-g16, int3-g16]\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(base)
        settings = ("--nsamples", "2", "--seqlen", "32", "--jobs", "1", "--space", "space.yaml")
        succeed("measure", "model", "--text", "text.txt", *settings, "-o", "work")
        succeed("plan", "work", "-b", "4.5bpw", "-o", "plan.json")
        succeed("compile", "plan.json", "-o", "out", "--no-kernels")
    return base


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder during the test: another one than that of the job, without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


# -- from another folder -----------------------------------------------------------------------------------------------


def test_a_plan_is_compiled_explained_and_reported_from_another_folder(job: Path, elsewhere: Path) -> None:
    assert (read_plan(job / "plan.json").model, read_plan(job / "plan.json").work) == ("model", "work")
    succeed("compile", job / "plan.json", "-o", "out", "--no-kernels")
    assert (elsewhere / "out" / "model.safetensors").read_bytes() == (job / "out" / "model.safetensors").read_bytes()
    for path in (job / "plan.json", job / "out"):
        assert "int4-g16" in succeed("explain", path, "q_proj").stdout
        assert "what one more MiB would buy" in succeed("explain", path).stdout
        assert not reallm.report(path, output="report.html").lacking
    (job / "plans").mkdir(exist_ok=True)
    shutil.copy(job / "plan.json", job / "plans" / "a.json")
    succeed("compile", job / "plans" / "a.json", "-o", "again", "--no-kernels")
    training = ("--text", job / "text.txt", "--seqlen", "32", "--steps", "1", "--adapter", "--rank", "1")
    result = run("finetune", job / "out", "-o", "adapter", *training)
    assert "the plan was made for" not in result.stderr  # the teacher is found; whether a step helps is another matter


def test_a_model_and_a_work_folder_that_moved_are_named_by_an_option(job: Path, elsewhere: Path) -> None:
    for name in ("work", "model", "out"):
        shutil.copytree(job / name, elsewhere / "moved" / name)
    shutil.copy(job / "plan.json", "plan.json")
    moved = elsewhere / "moved"
    moved.rename(elsewhere.parent / "moved")
    moved = elsewhere.parent / "moved"
    line = refusal("compile", "plan.json", "-o", "out", "--no-kernels")
    assert "the work folder work" in line and "--work" in line
    assert "--work" in refusal("explain", "plan.json", "q_proj")
    work = ("--work", moved / "work")
    line = refusal("compile", "plan.json", "-o", "out", *work)
    assert "the plan was made for the model model" in line and "--model" in line
    succeed("compile", "plan.json", "-o", "out", "--no-kernels", *work, "--model", moved / "model")
    succeed("explain", "plan.json", "q_proj", *work)
    assert "--teacher" in refusal("finetune", "out", "-o", "tuned", "--text", job / "text.txt", "--seqlen", "32")


def test_a_model_that_is_gone_does_not_become_another_one(job: Path, elsewhere: Path) -> None:
    """A folder of the same name beside the caller is another model, and is refused as such."""
    save_tiny("llama", elsewhere / "model", seed=5, dtype=torch.bfloat16)
    shutil.copytree(job / "work", elsewhere / "work")
    shutil.copy(job / "plan.json", "plan.json")
    assert "another model than model" in refusal("compile", "plan.json", "-o", "out", "--no-kernels")


def test_a_refit_names_the_option_for_its_model(job: Path, elsewhere: Path) -> None:
    shutil.copytree(job / "work", elsewhere / "work")
    (elsewhere / "held.txt").write_text("too short")
    refit = ("plan", "work", "-b", "4.5bpw", "--refit", "1", "--refit-text", "held.txt")
    assert "name it with --model" in refusal(*refit)
    assert "1024" in refusal(*refit, "--model", job / "model")  # the model is found, and the text is too short


# -- names with spaces and brackets ------------------------------------------------------------------------------------


def commands(stderr: str) -> list[list[str]]:
    """The next commands that were printed, split as a shell would split them."""
    return [shlex.split(line.partition("next: ")[2]) for line in stderr.splitlines() if "next: " in line]


def test_printed_commands_can_be_pasted_and_brackets_stay(job: Path, tmp_path: Path) -> None:
    work, plan, out = job / "work", tmp_path / f"{ODD}.json", tmp_path / ODD
    settings = ("--nsamples", "2", "--seqlen", "32", "--jobs", "1", "--space", job / "space.yaml")
    measured = succeed("measure", job / "model", "--text", job / "text.txt", *settings, "-o", work)
    assert commands(measured.stderr) == [["reallm", "plan", str(work), "--budget", "3.0bpw", "-o", "plan.json"]]
    planned = succeed("plan", work, "-b", "4.5 bpw", "-o", plan)
    assert commands(planned.stderr) == [["reallm", "compile", str(plan), "-o", "out/"]]
    compiled = succeed("compile", plan, "-o", out, "--no-kernels")
    assert commands(compiled.stderr)[0][:3] == ["reallm", "eval", str(out)]
    shown = succeed("inspect", out).stdout
    assert "[bold]" in "".join(line.strip("│ ") for line in shown.splitlines())
    missing = refusal("plan", work, "-b", "4.5bpw", "--preset", "gptq", "-o", plan)
    command = shlex.split(missing[missing.index("reallm measure") :].partition(" (with")[0])
    assert command[3:] == ["-o", str(work), "--space", "gptq"]
    (tmp_path / "gone").mkdir()
    lacking = reallm.report(plan, output=tmp_path / "r.html", work=None).lacking
    assert not lacking


# -- outputs that are taken --------------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A folder with a measured table written by hand."""
    costs = {"int4-g64": 0.1, "int8-g64": 0.001}
    write_record(tmp_path / TABLE_FILE, make_table(("block.0.up", 64, 64, "linear", costs)))
    return tmp_path


def test_an_earlier_plan_is_replaced_and_that_is_said(table: Path) -> None:
    path = table / "plan.json"
    assert "in place of" not in succeed("plan", table, "-b", "5bpw", "-o", path).stderr
    assert "in place of the plan for 5bpw" in succeed("plan", table, "-b", "9bpw", "-o", path).stderr
    assert read_plan(path).budget == "9bpw"


def test_nothing_but_a_plan_is_replaced_by_a_plan(table: Path) -> None:
    for name in ("notes.txt", TABLE_FILE):
        (table / "notes.txt").write_text("mine")
        before = (table / name).read_bytes()
        assert "is not a plan" in refusal("plan", table, "-b", "5bpw", "-o", table / name)
        with pytest.raises(UserError, match="is not a plan"):
            make_plan(table, budget="5bpw", output=table / name)
        assert (table / name).read_bytes() == before
    assert "is a folder" in refusal("plan", table, "-b", "5bpw", "-o", table)


def test_the_plan_inside_an_artifact_is_not_replaced(job: Path) -> None:
    before = (job / "out" / "plan.json").read_bytes()
    assert "folder of a model" in refusal("plan", job / "work", "-b", "5bpw", "-o", job / "out" / "plan.json")
    assert (job / "out" / "plan.json").read_bytes() == before


def test_measuring_into_the_folder_of_a_model_is_refused(job: Path) -> None:
    for folder in ("model", "out"):
        assert "is the folder of a model" in refusal("measure", job / "model", "-o", job / folder)
        assert not (job / folder / TABLE_FILE).exists()
    assert "is a file" in refusal("measure", job / "model", "-o", job / "text.txt")


@pytest.mark.parametrize("option", ["--json", "--figure", "-o"])
def test_an_output_that_cannot_be_a_file_is_refused_before_the_work(option: str, job: Path, tmp_path: Path) -> None:
    command = ["eval", job / "out", "--text", tmp_path / "no such text"] if option == "--json" else ["sweep", "no work"]
    (tmp_path / "file").write_text("")
    assert "is a folder; expected the name of a file" in refusal(*command, option, tmp_path)
    assert "file is a file; expected a folder" in refusal(*command, option, tmp_path / "file" / "x.json")


@pytest.mark.parametrize("number", [errno.ENAMETOOLONG, errno.ELOOP])
def test_a_path_that_cannot_be_read_is_one_line(number: int, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(self: Path) -> bool:
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "is_file", unreadable)
    assert os.strerror(number) in refusal("sweep", table)


WRONG: dict[str, tuple[str, ...]] = {
    "verify": ("verify", "{}"),
    "inspect": ("inspect", "{}"),
    "explain": ("explain", "{}"),
    "report": ("report", "{}", "-o", "report.html"),
    "diff": ("diff", "{}", "plan.json"),
    "compile": ("compile", "{}", "-o", "new"),
    "plan": ("plan", "{}", "-b", "4bpw"),
    "sweep": ("sweep", "{}"),
    "generate": ("generate", "{}", "abc"),
    "eval": ("eval", "{}", "--text", "text.txt"),
    "finetune": ("finetune", "{}", "--text", "text.txt", "-o", "new"),
    "measure": ("measure", "{}", "--text", "text.txt", "-o", "new"),
    "work": ("explain", "plan.json", "q_proj", "--work", "{}"),
    "model": ("compile", "plan.json", "-o", "new", "--work", "work", "--model", "{}"),
    "prefix": ("measure", "model", "--text", "text.txt", "--seqlen", "16", "-o", "new", "--prefix", "{}"),
    "adapter": ("generate", "out", "abc", "--adapter", "{}"),
    "space": ("measure", "model", "--text", "text.txt", "-o", "new", "--space", "{}"),
}
INPUTS = (
    "missing",
    "empty",
    "a file",
    "half.json",
    "list.json",
    "bytes.json",
    "half config",
    "list config",
    "half table",
)


@pytest.fixture(scope="module")
def wrong(job: Path) -> Path:
    """A folder beside a job with every one of INPUTS."""
    folder = job.parent / "wrong"
    shutil.copytree(job, folder)
    for name, content in {"half config": "{", "list config": "[]"}.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(content)
    (folder / "half table").mkdir()
    (folder / "half table" / TABLE_FILE).write_text('{"model": ')
    (folder / "empty").mkdir()
    (folder / "a file").write_text("text")
    (folder / "half.json").write_text('{"version": 1, ')
    (folder / "list.json").write_text("[1, 2]")
    (folder / "bytes.json").write_bytes(bytes(range(128, 256)))
    return folder


@pytest.mark.parametrize("command", WRONG)
def test_every_wrong_input_of_every_command_is_one_line(
    command: str, wrong: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(wrong)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in INPUTS:
        refusal(*(name if word == "{}" else word for word in WRONG[command]))
    assert not (wrong / "new").exists() and not (wrong / "report.html").exists()


def test_plans_of_other_kinds_of_files_are_not_read(job: Path) -> None:
    assert isinstance(reallm.inspect(job / "out").plan, Plan)
    assert "`reallm plan` writes" in refusal("inspect", job / "work" / TABLE_FILE)
