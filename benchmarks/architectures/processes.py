"""Running each case in a process of its own, forked from a server that has imported reallm once."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import transformers

from tests.support.tiny import tiny_tokenizer

from .cases import Case
from .outcome import Outcome, read_outcome
from .pipeline import run_case

TIMEOUT = 240.0
"""Seconds after which a case is ended."""
OUTCOME_FILE = "outcome.json"
PRELOADED = (
    *("reallm.measurement.measure", "reallm.planning.plan", "reallm.compilation.compile", "reallm.runtime.load"),
    *("reallm.runtime.generate_loaded", "reallm.evaluation.evaluate", "reallm.artifacts.verify"),
    *("transformers.generation.utils", "transformers.models.auto.modeling_auto"),
)
"""What reallm and transformers import when it is first used: seconds in each process otherwise."""


def run_cases(cases: list[Case], root: Path, jobs: int) -> Iterator[Outcome]:
    """Run `cases`, `jobs` at a time, each in its own folder of `root`; yield their outcomes in the order of ending."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *PRELOADED])
    waiting, running = list(reversed(cases)), list[tuple[Case, BaseProcess, float]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            case = waiting.pop()
            folder = root / case.name
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            process: BaseProcess = context.Process(target=_run, args=(case, folder))
            process.start()
            running.append((case, process, time.monotonic()))
        for entry in list(running):
            case, process, started = entry
            process.join(0.02)
            late = time.monotonic() - started > TIMEOUT
            if process.exitcode is None and not late:
                continue
            if late:
                process.kill()
                process.join()
            running.remove(entry)
            yield _outcome(case, root / case.name, process, late)


def _run(case: Case, folder: Path) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    with (folder / "output.txt").open("wb") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    outcome = run_case(case, folder, tiny_tokenizer())
    outcome.write(folder / OUTCOME_FILE)


def _outcome(case: Case, folder: Path, process: BaseProcess, late: bool) -> Outcome:
    path = folder / OUTCOME_FILE
    if path.is_file():
        return read_outcome(path)
    what = f"ended after {TIMEOUT:.0f} seconds" if late else f"the process died with exit code {process.exitcode}"
    return Outcome(case.name, case.class_name, case.kind, error=what)
