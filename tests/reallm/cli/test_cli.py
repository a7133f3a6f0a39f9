"""The command line: help, the whole job on a tiny model, and one line with exit code 2 for what a user gets wrong."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from strategies import make_table
from tiny import save_tiny
from typer.testing import CliRunner, Result

import reallm
from reallm.cli.main import app
from reallm.codegen.artifact import build
from reallm.planner.tables.measured_table import TABLE_FILE
from reallm.planner.tables.plan import Plan
from reallm.planner.tables.records import read_record, write_record

COMMANDS = (
    "compress",
    "measure",
    "plan",
    "sweep",
    "diff",
    "explain",
    "report",
    "compile",
    "eval",
    "generate",
    "finetune",
    "inspect",
    "verify",
    "demo",
)
SPACE = "linear: [int4-g16, nf3-g16, lm2-g16, aq1x4-d4]\nembedding: [int8-g16]\n"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refusal(*arguments: str | Path) -> str:
    """The one line on stderr of a command that must end with exit code 2."""
    result = run(*arguments)
    assert result.exit_code == 2, f"{result.exit_code}: {result.output} {result.exception!r}"
    lines = [line for line in result.stderr.splitlines() if line.startswith("reallm: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.output
    return lines[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, a text and a space, measured, planned and compiled once for this file."""
    base = tmp_path_factory.mktemp("job")
    save_tiny("llama", base / "model", dtype=torch.bfloat16)
    (base / "text.txt").write_text("".join(random.Random(0).choices("abcdefgh ", k=2000)), encoding="utf-8")
    (base / "space.yaml").write_text(SPACE)
    assert run(*measuring(base)).exit_code == 0
    assert run("plan", base / "work", "-b", "4.0bpw", "-o", base / "plan.json").exit_code == 0
    assert run("compile", base / "plan.json", "-o", base / "out", "--no-kernels").exit_code == 0
    return base


def measuring(base: Path, model: str = "model", work: str = "work") -> list[str | Path]:
    options: list[str | Path] = ["--text", base / "text.txt", "--space", base / "space.yaml", "-o", base / work]
    return ["measure", base / model, *options, "--nsamples", "4", "--seqlen", "64", "--jobs", "1"]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A folder with a measured table written by hand: two matrices of 64 x 64."""
    costs = {"int4-g64": 0.1, "int8-g64": 0.001}
    write_record(tmp_path / TABLE_FILE, make_table(*((f"block.{i}.up", 64, 64, "linear", costs) for i in range(2))))
    return tmp_path


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom reallm.cli.main import app\n"
        "print(CliRunner().invoke(app, ['--help']).output)\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pulp', 'matplotlib', 'jinja2'}\n"
        "print('heavy:', sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "heavy: []" in result.stdout
    assert all(command in result.stdout for command in COMMANDS)


def test_the_stages_are_functions_of_the_package() -> None:
    assert all(callable(getattr(reallm, name)) for name in reallm.__all__)
    stages = {command for command in COMMANDS if command not in ("diff", "eval", "demo")}
    assert stages | {"evaluate", "load", "refit"} <= set(reallm.__all__)
    with pytest.raises(AttributeError, match=r"'reallm' has no attribute 'measur'"):
        _ = reallm.measur


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_teaches_by_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: reallm {command}" in result.output


def test_the_whole_job_leaves_a_model_that_is_measured_and_speaks(folder: Path) -> None:
    against = ("--against", folder / "model", "--text", folder / "text.txt", "--seqlen", "64")
    result = run("eval", folder / "out", *against, "--windows", "2", "--json", folder / "eval.json")
    assert result.exit_code == 0, result.stderr
    report = json.loads((folder / "eval.json").read_text())
    plan = read_record(folder / "plan.json", Plan, "plan")
    assert report["comparison"]["divergence"]["mean"] > 0
    assert report["sizes"]["matrices_bytes"] == plan.matrices_bytes
    assert report["sizes"]["file_bytes"] == plan.file_bytes
    assert 8 * plan.matrices_bytes <= 4.0 * report["sizes"]["matrices_weights"]
    spoken = run("generate", folder / "out", "abc", "--max-new-tokens", "3")
    assert spoken.exit_code == 0
    assert spoken.stdout.startswith("abc")
    assert run("verify", folder / "out").exit_code == 0


def test_eval_without_against_gives_perplexity_alone(folder: Path) -> None:
    result = run("eval", folder / "model", "--text", folder / "text.txt", "--seqlen", "64", "--windows", "2")
    assert result.exit_code == 0
    assert "perplexity" in result.stdout
    assert "KL to the original" not in result.stdout


def test_inspect_shows_plan_and_bytes_of_an_artifact_and_of_a_plan(folder: Path) -> None:
    whole = run("inspect", folder / "out", "--matrices", "--json", folder / "inspect.json")
    assert whole.exit_code == 0, whole.stderr
    assert "weights files" in whole.stdout
    facts = json.loads((folder / "inspect.json").read_text())
    assert facts["file_bytes"] == (folder / "out" / "model.safetensors").stat().st_size
    assert len(facts["plan"]["choices"]) == 14
    assert run("inspect", folder / "plan.json").exit_code == 0


def test_a_plan_prints_its_proof_and_the_best_uniform_one(table: Path) -> None:
    result = run("plan", table, "--budget", "7bpw", "-o", table / "plan.json")
    assert result.exit_code == 0
    for word in ("optimal", "gap", "shadow price", "best uniform", "int4-g64", "int8-g64"):
        assert word in result.stdout, word
    assert read_record(table / "plan.json", Plan, "plan").counted_bytes <= 7 * 2 * 64 * 64 // 8


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["-b", "0"], "--budget '0'"),
        (["-b", "40bpw"], "--budget '40bpw'"),
        (["-b", "3 bananas"], "--budget '3 bananas'"),
        (["-b", "1bpw"], "smallest"),
        (["-b", "8bpw", "--pin", "nothing=int4-g64"], "nothing"),
        (["-b", "8bpw", "--pin", "up=int9-g64"], "int9-g64"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_and_nothing_written(table: Path, options: list[str], expected: str) -> None:
    assert expected in refusal("plan", table, *options, "-o", table / "plan.json")
    assert not (table / "plan.json").exists()


def test_a_folder_that_was_not_measured_names_the_command_that_does_it(tmp_path: Path) -> None:
    assert "`reallm measure` makes it" in refusal("plan", tmp_path, "-b", "3bpw")


def test_models_and_texts_that_cannot_be_read_are_refused(folder: Path, tmp_path: Path) -> None:
    assert "does not exist" in refusal("measure", tmp_path / "no" / "such" / "model", "-o", tmp_path / "work")
    shutil.copytree(folder / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)
    assert "truncated" in refusal("measure", tmp_path / "model", "-o", tmp_path / "work")
    (tmp_path / "ten.txt").write_text("one two three four five six seven eight nine ten\n")
    few = ("--text", tmp_path / "ten.txt", "--seqlen", "200", "-o", tmp_path / "work")
    assert "200 needed" in refusal("measure", folder / "model", *few)
    assert not (tmp_path / "work" / TABLE_FILE).exists()


def test_workers_that_cannot_be_had_are_refused_before_anything_is_done(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    work = ("-o", tmp_path / "work")
    assert "pip install 'reallm[ray]'" in refusal("measure", folder / "model", "--backend", "ray", *work)
    assert "is for --backend ray" in refusal("measure", folder / "model", "--ray-address", "head:6379", *work)
    assert not (tmp_path / "work").exists()


def test_a_nan_in_a_weight_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    line = refusal("measure", tmp_path / "model", "-o", tmp_path / "work")
    assert "model.layers.0.self_attn.q_proj.weight" in line


def test_a_plan_for_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    other = save_tiny("llama", tmp_path / "other", seed=1, dtype=torch.bfloat16)
    line = refusal("compile", folder / "plan.json", "--model", other, "-o", tmp_path / "out")
    assert "another model" in line
    assert not (tmp_path / "out").exists()


def test_one_changed_byte_of_an_artifact_is_found(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "out", tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1000] ^= 1
    weights.write_bytes(data)
    assert "model.safetensors" in refusal("verify", tmp_path / "out")
    assert "model.safetensors" in refusal("generate", tmp_path / "out", "abc")


def test_an_output_that_is_taken_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    assert str(tmp_path) in refusal("compile", folder / "plan.json", "-o", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_a_full_disk_is_one_line_and_the_old_plan_survives(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("plan", table, "-b", "8bpw", "-o", table / "plan.json").exit_code == 0
    before = (table / "plan.json").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert "disk is full" in refusal("plan", table, "-b", "7bpw", "-o", table / "plan.json")
    assert (table / "plan.json").read_bytes() == before
    assert sorted(path.name for path in table.iterdir()) == ["plan.json", TABLE_FILE]


def test_a_device_that_is_not_there_is_refused_by_every_command(folder: Path, table: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "out", folder / "text.txt"
    commands = [
        ("measure", folder / "model", "--text", text, "-o", out, "--device", "cuda:77"),
        ("compress", folder / "model", "-b", "4bpw", "--text", text, "-o", out, "--device", "cuda:77"),
        ("compile", folder / "plan.json", "-o", out, "--device", "cuda:77"),
        ("eval", folder / "model", "--text", text, "--device", "cuda:77"),
        ("generate", folder / "model", "abc", "--device", "cuda:77"),
        ("finetune", folder / "out", "-o", out, "--text", text, "--device", "cuda:77"),
    ]
    for command in commands:
        assert "--device cuda:77" in refusal(*command)
    assert not out.exists()
    result = run("plan", "--help")
    assert "--refit-device" in result.output


def test_a_gpu_out_of_memory_is_one_line(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 80 GiB. Process 1 has.")

    monkeypatch.setattr(os, "fsync", full)
    line = refusal("plan", table, "-b", "7bpw", "-o", table / "plan.json")
    assert (
        "the GPU is out of memory (CUDA out of memory. Tried to allocate 2.00 GiB)" in line and "--device cpu" in line
    )


@pytest.mark.parametrize("number", [errno.EACCES, errno.EISDIR, errno.ENOTDIR, errno.EROFS, errno.EDQUOT])
def test_a_place_that_cannot_be_written_is_one_line(table: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refused(descriptor: int) -> None:
        raise OSError(number, os.strerror(number), "/the/place")

    monkeypatch.setattr(os, "fsync", refused)
    line = refusal("plan", table, "-b", "7bpw", "-o", table / "plan.json")
    assert f"/the/place: {os.strerror(number)}" in line


def test_an_output_below_a_file_is_one_line(table: Path) -> None:
    (table / "file").write_text("")
    assert "/file/" in refusal("plan", table, "-b", "7bpw", "-o", table / "file" / "below" / "plan.json")


def test_a_kernel_that_does_not_compile_names_the_way_around(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(build, "emit", lambda spec: "import nothing_of_that_name\n")
    assert "--objects" in refusal("compile", folder / "plan.json", "-o", tmp_path / "out", "--objects", "sm_80")
    assert not (tmp_path / "out").exists()


def test_other_errors_keep_their_traceback(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    result = run("plan", table, "-b", "8bpw", "-o", table / "plan.json")
    assert result.exit_code == 1
    assert isinstance(result.exception, OSError)


INTERRUPTED = """
import os, signal
from reallm.measurement.cache import Cache
from reallm.cli.main import main

put, results = Cache.put_measurement, []

def counted(cache, key, record):
    put(cache, key, record)
    results.append(key)
    if len(results) == 3:
        os.kill(os.getpid(), signal.SIGINT)

Cache.put_measurement = counted
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit it ignored
main()
"""


def test_ctrl_c_during_measure_resumes_to_the_same_table(folder: Path) -> None:
    """The process gets Ctrl-C's signal right after its third result; the second run must only add to them."""
    arguments = [*map(str, measuring(folder, work="stopped"))]
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTED, *arguments], stderr=subprocess.PIPE, text=True)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 130, stderr
    assert stderr.splitlines()[-1] == "reallm: interrupted; the same command continues where it stopped"
    assert "\r" not in stderr  # a log file gets whole lines, of other libraries' progress too
    assert not (folder / "stopped" / TABLE_FILE).exists()
    kept = {path: path.stat().st_mtime_ns for path in (folder / "stopped").glob("cache/*/*.json")}
    assert run(*measuring(folder, work="stopped")).exit_code == 0
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    once, twice = (json.loads((folder / work / TABLE_FILE).read_text()) for work in ("work", "stopped"))
    for found in (once, twice):
        found.pop("base")  # seconds and memory
        for record in found["measurements"]:
            record.pop("seconds")
    assert once == twice


def test_sweep_prints_and_writes_every_budget(table: Path) -> None:
    result = run("sweep", table, "--from", "9bpw", "--to", "3bpw", "--points", "3", "-o", table / "pareto.csv")
    assert result.exit_code == 0 and "1 of 3 budgets are smaller than the smallest plan" in result.stderr, result.output
    lines = (table / "pareto.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["budget", "6bpw", "9bpw"]
    assert all(line.split(",")[0] in result.stdout for line in lines[1:])
    assert "both ends need the same unit" in refusal("sweep", table, "--from", "3bpw", "--to", "1MiB")
    assert "smallest plan takes" in refusal("sweep", table, "--from", "1bpw", "--to", "2bpw")


def test_a_plan_keeps_what_is_asked_beside_the_budget(table: Path) -> None:
    """Pools, latency, few formats and room for keys and values, as the command prints and keeps them."""
    path = table / "asked.json"
    limits = ("--pool", "a=100KiB:block.0", "--latency", "1s", "--device", "h100-sxm", "--max-formats", "2")
    room = ("--adapter-rank", "2", "--workspace", "10KiB", "--target", "triton")
    found = run("plan", table, "-b", "1MiB", "-o", path, *limits, *room)
    assert found.exit_code == 0, found.output
    assert all(name in found.stdout for name in ("pool a", "latency", "beside the weights"))
    plan = read_record(path, Plan, "plan")
    assert [limit.name for limit in plan.limits] == ["pool a", "latency"] and plan.reserved.workspace_bytes == 10240
    assert "no such device or file" in refusal("plan", table, "-b", "1MiB", "-o", path, "--device", "abacus")
    assert "unknown target" in refusal("plan", table, "-b", "1MiB", "-o", path, "--target", "abacus")
    assert "has no KV-cache measurement" in refusal("plan", table, "-b", "1MiB", "-o", path, "--context", "10")
    (table / "slow.json").write_text(
        '{"name": "slow", "bytes_per_second": 1e9, "weights_per_second": {"scalar": 1e9}, "launch_seconds": 0}'
    )
    lacking = refusal("plan", table, "-b", "1MiB", "-o", path, "--device", table / "slow.json")
    assert "weights_per_second lacks additive, dense" in lacking


def test_plans_are_explained_and_compared(table: Path) -> None:
    small, large = table / "small.json", table / "large.json"
    assert run("plan", table, "-b", "4.5bpw", "-o", small).exit_code == 0
    shown = run("plan", table, "-b", "9bpw", "-o", large, "--best", "2")
    assert shown.exit_code == 0 and "plan 2 of the 2 best" in shown.stdout
    compared = run("diff", small, large)
    assert compared.exit_code == 0 and "2 of 2 matrices" in compared.stdout
    explained = run("explain", small, "block.1")
    assert explained.exit_code == 0 and "int4-g64 *" in explained.stdout and "block.0" not in explained.stdout
    assert "what one more MiB would buy" in run("explain", small).stdout
    assert "matches no matrix" in refusal("explain", small, "nothing")
    arguments = ("plan", table, "-b", "5bpw", "-o", table / "none.json")
    assert "name one with --refit-text" in refusal(*arguments, "--refit", "1")
    assert "add --refit 2" in refusal(*arguments, "--text", "held.txt")
    assert not (table / "none.json").exists()
    write_record(table / TABLE_FILE, make_table(("other", 64, 64, "linear", {"int4-g64": 0.1})))
    assert "made from another measured table" in refusal("explain", small)


def test_a_plan_is_reported_and_a_sweep_drawn(table: Path) -> None:
    assert run("plan", table, "-b", "7bpw", "-o", table / "plan.json").exit_code == 0
    result = run("report", table / "plan.json", "-o", table / "report.html", "--png", table / "figures")
    assert result.exit_code == 0, result.output
    assert (table / "report.html").read_text().startswith("<!doctype html>")
    assert {"bits.png", "pareto.png"} <= {path.name for path in (table / "figures").iterdir()}
    drawn = run("sweep", table, "--from", "5bpw", "--to", "9bpw", "--points", "3", "--figure", table / "pareto.svg")
    assert drawn.exit_code == 0 and f"wrote {table / 'pareto.svg'}" in drawn.stderr, drawn.output
    (table / TABLE_FILE).unlink()
    bare = run("report", table / "plan.json", "-o", table / "bare.html")
    assert bare.exit_code == 0 and "--work FOLDER" in bare.stderr


def test_reports_that_cannot_be_are_refused(table: Path) -> None:
    assert run("plan", table, "-b", "7bpw", "-o", table / "plan.json").exit_code == 0
    assert "`reallm plan` makes it" in refusal("report", table / "none.json", "-o", table / "report.html")
    assert "is not what `reallm plan` writes" in refusal("report", table / TABLE_FILE, "-o", table / "report.html")
    assert "expected the name of an .html file" in refusal("report", table / "plan.json", "-o", table / "plan.json")
    assert "/plan.json" in refusal("report", table / "plan.json", "-o", table / "plan.json" / "report.html")
    assert "`reallm measure` makes it" in refusal("report", table / "plan.json", "--work", table / "gone")
    assert "--figure" in refusal("sweep", table, "--from", "5bpw", "--to", "9bpw", "--figure", table / "pareto.gif")
    assert not (table / "report.html").exists()
