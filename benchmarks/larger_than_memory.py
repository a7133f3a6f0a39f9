"""Models larger than the memory: the whole job under an enforced limit, each command killed once in its middle.

    make bench NAME=larger_than_memory [MODELS=llama,experts] [LIMIT_GIB=6] [PLACE=folder]
        [STEPS=calibrate,encode,plan,compile,eval] [KILLED=calibrate,encode,compile] [FORMAT=int4-g64]

"llama" has random weights with the shapes of LLaMA-3-8B (16 GB in bf16), "experts" those of two blocks of
Qwen3-30B-A3B. All blocks are calibrated on WINDOWS windows of SEQLEN tokens; the first two are encoded in FORMATS and
packed, the others stay as they are: a file of statistics that is not needed is deleted as soon as it is complete, since
all of them take more disk than many have. The commands of KILLED run twice: killed (kill -9) when they have done part
of their work, then to their end. Steps that are not run keep their earlier results. Needs Linux, the right to make a
control group, and 40 GB of disk at PLACE (default: .bench).
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from json import loads
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.bench import machine
from benchmarks.memory_limit import MemoryLimit, Run
from benchmarks.peers import ROOT
from benchmarks.random_checkpoint import LLAMA_3_8B, QWEN3_30B_A3B, write_checkpoint
from reallm.cli.demo import fetch_model
from reallm.cli.tables import columns_table
from reallm.kernels.storage.atomic import canonical_json, write_text_atomic

RESULTS = ROOT / "benchmarks" / "results" / "larger_than_memory.json"
PLACE = Path(os.environ.get("PLACE") or ROOT / ".bench") / "larger_than_memory"
LIMIT = int(float(os.environ.get("LIMIT_GIB") or 6) * (1 << 30))
MODELS = (os.environ.get("MODELS") or "llama,experts").split(",")
WINDOWS, SEQLEN, PACKED_BLOCKS = 2, 128, 2
STEPS = (os.environ.get("STEPS") or "calibrate,encode,plan,compile,eval").split(",")
KILLED = (os.environ.get("KILLED") or "calibrate,encode,compile").split(",")
"""The steps that are killed once."""
FORMATS = {"linear": os.environ.get("FORMAT") or "int4-g64", "expert": "int4-g64"}
SHAPES: dict[str, tuple[dict[str, object], int]] = {"llama": (LLAMA_3_8B, 32), "experts": (QWEN3_30B_A3B, 2)}
"""Model -> (its settings, number of blocks)."""
SMALL_BYTES = 1 << 20
"""Files of statistics below this are only marks."""
REALLM = (sys.executable, "-m", "reallm")
Row = dict[str, Any]
"""What one step took, by the keys of COLUMNS."""
COLUMNS = {
    "step": "step",
    "seconds": "seconds",
    "processor_seconds": "processor s",
    "peak_mib": "peak MiB",
    "killed_after": "killed after s",
}


class Job:
    """The job on one model."""

    def __init__(self, name: str, limit: MemoryLimit) -> None:
        self.name, self.limit = name, limit
        self.settings, self.blocks = SHAPES[name]
        self.folder = PLACE / name
        self.model, self.work, self.out = (self.folder / part for part in ("model", "work", "out"))
        self.lowest = self.blocks
        """The block that calibration, which goes from the last to the first, has reached."""
        self.text, self.space = self.folder / "text.txt", self.folder / "space.yaml"

    def prepare(self) -> None:
        """Write the checkpoint, the text and the candidate formats, unless they are there."""
        if not (self.model / "config.json").exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            tokenizer = fetch_model(PLACE, Console())
            write_checkpoint(self.model, self.settings, tokenizer, num_hidden_layers=self.blocks)
        if not self.text.exists():
            shutil.copyfile(ROOT / "CHANGELOG.md", self.text)
        self.space.write_text("".join(f"{kind}: [{name}]\n" for kind, name in FORMATS.items()))

    def steps(self) -> Iterator[tuple[str, list[str], Callable[[], bool]]]:
        """Name, arguments of reallm, and when the first run of it is killed."""
        text = ["--text", str(self.text), "--seqlen", str(SEQLEN)]
        windows = ["--nsamples", str(WINDOWS), "--jobs", "1", "--space", str(self.space)]
        measure = ["measure", str(self.model), "-o", str(self.work), *text, *windows]
        yield "calibrate", measure, lambda: self.lowest <= self.blocks // 2
        yield "encode", measure, lambda: len(list(self.work.glob("cache/*/*.json"))) >= 3
        plan = str(self.folder / "plan.json")
        yield "plan", ["plan", str(self.work), "--budget", "5bpw", "-o", plan], lambda: False
        compile_ = ["compile", plan, "-o", str(self.out), "--no-kernels"]
        yield "compile", compile_, lambda: self._partial_bytes() > 1 << 30
        evaluate = ["eval", str(self.out), "--against", str(self.model), *text, "--windows", "1"]
        yield "eval", [*evaluate, "--json", str(self.folder / "eval.json")], lambda: False

    def _partial_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.glob(".out*/.model*.partial"))

    def watch(self) -> None:
        """Delete complete statistics of blocks that are not packed."""
        for path in self.work.glob("statistics/*/block-*.safetensors"):
            number = int(path.stem.removeprefix("block-"))
            self.lowest = min(self.lowest, number)
            if number >= PACKED_BLOCKS and path.stat().st_size > SMALL_BYTES:
                path.unlink()

    def run(self) -> Iterator[dict[str, Any]]:
        """Run the steps of STEPS; what each took."""
        for step, arguments, middle in self.steps():
            if step not in STEPS:
                continue
            command = [*REALLM, *arguments]
            killed = self.limit.run(command, middle, self.watch) if step in KILLED else None
            # "calibrate" is the first half of `measure`: its complete run ends where the encoding begins
            end = self._is_calibrated if step == "calibrate" else None
            done = self.limit.run(command, end, self.watch)
            if done.returned and not done.killed:
                raise SystemExit(f"{step} of {self.name} failed with {done.returned}")
            yield _row(step, killed, done)

    def _is_calibrated(self) -> bool:
        return any(self.work.glob("statistics/*/calibration.json"))

    def facts(self) -> dict[str, Any]:
        """The sizes of the checkpoint and of the statistics, in bytes, and the measured divergence."""
        found = {
            "checkpoint_bytes": sum(path.stat().st_size for path in self.model.glob("*.safetensors")),
            "statistics_bytes": sum(path.stat().st_size for path in self.work.glob("statistics/*/*.safetensors")),
        }
        evaluation = self.folder / "eval.json"
        if evaluation.exists():
            found["kl"] = loads(evaluation.read_text())["comparison"]["divergence"]["mean"]
        return found


def _row(step: str, killed: Run | None, done: Run) -> dict[str, Any]:
    """One step: what its complete run took, the larger peak of its runs, and when the first one was killed."""
    peak = max(run.peak_bytes for run in (killed, done) if run)
    return {
        "step": step,
        "seconds": round(done.seconds, 1),
        "processor_seconds": round(done.processor_seconds, 1),
        "peak_mib": round(peak / (1 << 20)),
        "killed_after": round(killed.seconds, 1) if killed and killed.killed else None,
    }


def keep(name: str, row: Row, facts: dict[str, Any]) -> list[Row]:
    """Add a step to the results of model `name`, in place of an earlier one of that name; returns all its steps."""
    record: dict[str, Any] = loads(RESULTS.read_text()) if RESULTS.exists() else {"models": {}}
    earlier: list[Row] = record["models"].get(name, {}).get("steps", [])
    steps = [*(each for each in earlier if each["step"] != row["step"]), row]
    record["models"][name] = {**facts, "steps": steps}
    record |= {"command": "make bench NAME=larger_than_memory", "limit_bytes": LIMIT, "machine": machine()}
    write_text_atomic(RESULTS, canonical_json(record))
    return steps


def main() -> None:
    """Run the steps on every model, keep the results and print the tables."""
    limit = MemoryLimit(LIMIT)
    for name in MODELS:
        job, steps = Job(name, limit), list[dict[str, Any]]()
        job.prepare()
        for row in job.run():
            steps = keep(name, row, job.facts())
        cells = [[str(row[key]) if row[key] is not None else "" for key in COLUMNS] for row in steps]
        Console().print(columns_table(f"{name} within {LIMIT / (1 << 30):g} GiB", list(COLUMNS.values()), cells))


if __name__ == "__main__":
    main()
