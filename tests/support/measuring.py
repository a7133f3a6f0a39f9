"""`measure` in processes of its own, for tests of what interrupts it.

The processes are forked from a server that has imported reallm once, which saves seconds for each of them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from reallm.measurement.measure import measure

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["reallm.measurement.measure"])


def start_measure(model: Path, output: Path, stderr: Path, **settings: object) -> BaseProcess:
    """Start `measure` on `model` with its text and space, in a session of its own; what it prints goes to `stderr`."""
    process = _CONTEXT.Process(target=_measure, args=(model, output, stderr, settings))
    process.start()
    return process


def _measure(model: Path, output: Path, stderr: Path, settings: dict[str, object]) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell inherit the signal ignored
    with stderr.open("wb") as stream:
        os.dup2(stream.fileno(), 2)
    torch.set_num_threads(1)
    arguments = {"text": model / "text.txt", "space": model / "space.yaml", **settings}
    measure(model, output=output, **arguments)  # type: ignore[arg-type]
