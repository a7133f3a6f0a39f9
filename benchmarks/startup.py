"""Processor seconds of whole processes: every command that needs no torch, the first token of `generate`, `compile`.

    make demo
    make bench NAME=startup

Each command runs in REPEATS new processes; the figure is the median of their user and system time, those of compilers
that they start included, because other work may run on the machine. "small" is a table with the matrices of one block
of the demo's model, so that what remains is the start; "demo" is the demo's whole table, plan or artifact, so that the
work of the command is included. The first text is generated after `compile` into an empty cache folder. Floors:
Python alone, and `import torch`.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from benchmarks.bench import Figure, machine
from benchmarks.peers import ROOT
from reallm.cli.tables import columns_table
from reallm.errors import UserError
from reallm.kernels.storage.atomic import canonical_json, write_text_atomic
from reallm.planner.tables.measured_table import TABLE_FILE, MeasuredTable
from reallm.planner.tables.records import read_record, write_record

RESULTS = ROOT / "benchmarks" / "results" / "startup.json"
DEMO = ROOT / "demo"
PACKAGES = ("reallm", "torch", "transformers", "numpy", "pydantic", "typer", "rich")
REPEATS = 7
START_S, TOKEN_S, COMPILE_S = 0.5, 3.0, 20.0
"""Targets: the start of a command without torch, the first token, compiling the demo's plan."""
BLOCK = "model.layers.0."
PROMPT = "The capital of France is"


@dataclass(frozen=True)
class Row(Figure):
    """A figure with the wall time beside it."""

    least: float
    """The least of the runs, in the same unit: other work on the machine, which shares caches and cores, only adds."""
    wall: float
    """Median wall time in seconds."""
    runs: int
    load: float
    """Load average of the machine when the runs ended."""


def measured(
    figure: str, command: Sequence[str | Path], target: float | None, runs: int = REPEATS, cache: Path | None = None
) -> Row:
    """Run `command` in `runs` processes, with `cache` as the cache folder if given. Raises UserError if one fails."""
    environment = os.environ | ({} if cache is None else {"REALLM_CACHE": str(cache)})
    times = []
    for _ in range(runs):
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        process = subprocess.run([*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True)
        wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        if process.returncode:
            raise UserError(f"{figure}: {process.stderr.strip()[-300:]}")
        times.append((after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall))
    own, wall = (statistics.median(values) for values in zip(*times, strict=True))
    return Row(
        figure=figure,
        unit="processor s",
        ours=own,
        peer_name="target",
        peer=target,
        ratio=None if target is None else own / target,
        versions={name: version(name) for name in PACKAGES},
        machine=machine(),
        least=min(seconds for seconds, _ in times),
        wall=wall,
        runs=runs,
        load=os.getloadavg()[0],
    )


def reallm(*arguments: str | Path) -> list[str | Path]:
    """The command line of `reallm`."""
    return [sys.executable, "-m", "reallm", *arguments]


def small_work(folder: Path) -> Path:
    """A work folder whose table has the matrices of one block of the demo's."""
    table = read_record(DEMO / "work" / TABLE_FILE, MeasuredTable, "measure")
    chosen = {
        "matrices": tuple(matrix for matrix in table.matrices if matrix.name.startswith(BLOCK)),
        "measurements": tuple(record for record in table.measurements if record.matrix.startswith(BLOCK)),
        "predictions": tuple(record for record in table.predictions if record.matrix.startswith(BLOCK)),
        "shared": (),
    }
    folder.mkdir()
    write_record(folder / TABLE_FILE, table.model_copy(update=chosen))
    return folder


def floors() -> Iterator[Row]:
    """What Python and torch take themselves."""
    for figure, code in (
        ("python", "pass"),
        ("import numpy", "import numpy"),
        ("import torch", "import torch"),
        ("import torch and transformers' PreTrainedModel", "import torch; from transformers import PreTrainedModel"),
    ):
        yield measured(figure, [sys.executable, "-c", code], None)


def light_commands(folder: Path) -> Iterator[Row]:
    """The commands that need no torch."""
    work, plan = small_work(folder / "work"), folder / "plan.json"
    yield measured("import reallm", [sys.executable, "-c", "import reallm"], START_S)
    yield measured("--help", reallm("--help"), START_S)
    yield measured("plan --help", reallm("plan", "--help"), START_S)
    yield measured("plan, small", reallm("plan", work, "-b", "3bpw", "-o", plan), START_S)
    yield measured("diff, small", reallm("diff", plan, plan), START_S)
    yield measured("explain, small", reallm("explain", plan), START_S)
    ends = ("--from", "2.5bpw", "--to", "4bpw", "--points", "5")
    yield measured("sweep of 5 budgets, small", reallm("sweep", work, *ends), START_S)
    yield measured("inspect a plan, small", reallm("inspect", plan), START_S)
    yield measured("inspect the artifact, demo", reallm("inspect", DEMO / "out"), START_S)
    yield measured("verify the artifact of 48 MiB, demo", reallm("verify", DEMO / "out"), None)
    yield measured("plan, demo", reallm("plan", DEMO / "work", "-b", "3bpw", "-o", plan), None)
    yield measured("explain, demo", reallm("explain", DEMO / "plan.json"), None)
    yield measured("sweep of 5 budgets, demo", reallm("sweep", DEMO / "work", *ends), None)


def compile_and_generate(folder: Path) -> Iterator[Row]:
    """Compile into an empty cache folder and a filled one, then the first token of the artifact."""
    output, cache = folder / "out", folder / "cache"
    command = reallm("compile", DEMO / "plan.json", "-o", output, "--force")
    yield measured("compile the demo's plan, empty cache folder", command, COMPILE_S, 1, cache)
    text = reallm("generate", output, PROMPT, "--max-new-tokens", "1")
    yield measured("generate's first text, one token", text, TOKEN_S, 1, cache)
    yield measured("generate one token", text, TOKEN_S, cache=cache)
    yield measured("compile the demo's plan again", command, COMPILE_S, 1, cache)
    sampled = [*text, "--temperature", "1"]
    yield measured("generate one token, sampled: transformers loads the model", sampled, None, 3, cache)


def main() -> None:
    """Run all, write and print."""
    if not all((DEMO / name).exists() for name in ("work", "plan.json", "out")):
        raise UserError(f"{DEMO} has no work, plan.json and out; run `make demo` first")
    done: list[Row] = []
    with TemporaryDirectory() as name:
        for part in (floors(), light_commands(Path(name)), compile_and_generate(Path(name))):
            for row in part:
                done.append(row)
                write_text_atomic(RESULTS, canonical_json([asdict(row) for row in done]))
    lines = [
        [
            row.figure,
            f"{row.ours:.2f}",
            f"{row.least:.2f}",
            f"{row.wall:.2f}",
            "-" if row.peer is None else f"{row.peer:g}",
            str(row.runs),
        ]
        for row in done
    ]
    headings = ("process", "processor s", "least", "wall s", "target", "runs")
    Console(width=140).print(columns_table(f"start-up on {machine()}", headings, lines))


if __name__ == "__main__":
    main()
