"""Everything that only a GPU can tell, in under 8 minutes: tests on the device, the trellis search, kernels, decoding.

    make bench NAME=gpu_check

Each part is a process with a time limit of its own. A part that fails or takes too long does not end the run: what it
printed is kept as text. All of it goes into one file, RESULTS. Without a GPU a line says so and nothing is run.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import ROOT
from reallm.kernels.storage.atomic import canonical_json, write_text_atomic

RESULTS = ROOT / "benchmarks" / "results" / "gpu_check.json"
TOTAL_SECONDS = 460.0
TAIL_CHARACTERS = 6000
DEVICE_TESTS = (
    "tests/codegen/triton/test_on_device.py",
    "tests/reallm/codecs/test_triton_search.py::test_the_gpu_finds_the_native_codes",
    "tests/reallm/measurement/test_gpu_runs.py::test_the_stages_run_on_a_gpu",
    "tests/codegen/launch/test_launch.py::test_misaligned_activations_are_copied",
    "tests/reallm/runtime/test_cuda_graph.py::test_recorded_on_a_gpu",
    "tests/reallm/runtime/test_cuda_graph.py::test_a_text_generated_on_a_gpu_is_that_of_transformers",
    "tests/reallm/runtime/test_cuda_graph.py::test_an_artifact_on_a_gpu",
)
"""All tests that are skipped without a GPU."""
FEW = {"ROUNDS": "2", "PEERS": "none"}


@dataclass(frozen=True)
class Part:
    """One part of the check: a command, its limit in seconds, its environment, and the file of its figures."""

    name: str
    command: tuple[str, ...]
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)
    results: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """How one part ended."""

    name: str
    command: str
    status: str
    """passed, failed (exit code), timed out, or not started."""
    seconds: float
    output: str
    """The end of what the part printed."""
    figures: Any = None
    """What the part wrote to its file of figures, also if it failed later."""


def module(name: str) -> tuple[str, ...]:
    """The command that runs a benchmark."""
    return sys.executable, "-m", f"benchmarks.{name}"


PARTS = (
    Part(
        "device tests",
        (sys.executable, "-m", "pytest", "-n", "0", "-q", "--durations=5", *DEVICE_TESTS),
        170,
    ),
    Part("trellis search", module("gpu_search"), 80, {}, RESULTS.with_name("gpu_search.json")),
    Part("triton_kernels", module("triton_kernels"), 110, FEW, RESULTS.with_name("gpu_kernels.json")),
    Part(
        "gpu_decode",
        module("gpu_decode"),
        100,
        FEW | {"FORMATS": "tq3-l12+ldl2+rot,uint4-g64"},
        RESULTS.with_name("gpu_decode.json"),
    ),
)


def run_part(part: Part, left: float) -> Outcome:
    """Run one part within its limit and the `left` seconds; no failure of it is raised."""
    command, began, started_at = " ".join(part.command), time.monotonic(), time.time()
    limit = min(part.seconds, left)
    if limit < 1:
        return Outcome(part.name, command, "not started: no time left", 0.0, "")
    try:
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env=os.environ | dict(part.environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return Outcome(part.name, command, f"failed: {error}", 0.0, "")
    try:
        output, _ = process.communicate(timeout=limit)
        status = "passed" if process.returncode == 0 else f"failed (exit code {process.returncode})"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the session of this part, with its own children
        output, _ = process.communicate()
        status = f"timed out after {limit:.0f} s"
    seconds = round(time.monotonic() - began, 1)
    return Outcome(part.name, command, status, seconds, output[-TAIL_CHARACTERS:], _figures(part, started_at))


def _figures(part: Part, started_at: float) -> Any:
    """What `part` has written to its file since `started_at`; None if it has written nothing that can be read."""
    path = part.results
    if path is None or not path.exists() or path.stat().st_mtime < started_at - 1:
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None


def check(parts: Sequence[Part], results: Path, seconds: float = TOTAL_SECONDS) -> list[Outcome]:
    """Run all parts within `seconds` and write what is known after each of them to `results`."""
    began, outcomes = time.monotonic(), list[Outcome]()
    machine = {"python": platform.python_version(), "torch": torch.__version__, "reallm": version("reallm")}
    if torch.cuda.is_available():
        machine |= {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    for part in parts:
        outcome = run_part(part, seconds - (time.monotonic() - began))
        outcomes.append(outcome)
        print(f"{part.name}: {outcome.status}, {outcome.seconds:.0f} s", flush=True)
        write_text_atomic(results, canonical_json({"machine": machine, "parts": [asdict(each) for each in outcomes]}))
    return outcomes


def main() -> int:
    """Check this machine's GPU; 0 if there is none, or if every part passed."""
    if not torch.cuda.is_available():
        print(f"gpu_check: torch {torch.__version__} finds no CUDA GPU on this machine; nothing was run")
        return 0
    outcomes = check(PARTS, RESULTS)
    print(f"wrote {RESULTS}")
    return int(any(outcome.status != "passed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
