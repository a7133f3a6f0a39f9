"""The folder `<output>.partial`, from which an interrupted run continues, and the complete checkpoints in it.

A checkpoint is complete when its `whole.json`, which is written last, lists every file with its sha256; an incomplete
checkpoint is removed. `ended.json` beside the checkpoints says that training is over and which checkpoint is the
result, so that a resumed run only has to write the result. The Trainer loads its checkpoints from safetensors or with
`weights_only`, and never unpickles arbitrary objects.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainingArguments

from reallm.artifacts.manifest import sha256_file
from reallm.errors import UserError
from reallm.kernels.storage.atomic import canonical_json, write_text_atomic
from reallm.system.lock import LOCK_FILE
from reallm.system.progress import progress_bar

from .processes import SINGLE_PROCESS, TrainingProcesses

LOG = logging.getLogger(__name__)
SETTINGS_FILE = "settings.json"
COMPLETE_FILE = "whole.json"
ENDED_FILE = "ended.json"

RunIdentity = Mapping[str, int | float | str | None]
"""The settings and inputs that identify a run; two runs with equal identities have the same result."""


def progress_folder(output: Path) -> Path:
    """The folder for the checkpoints of the run that writes `output`."""
    return output.with_name(f"{output.name}.partial")


def open_progress(folder: Path, identity: RunIdentity, resume: bool) -> None:
    """Prepare `folder` for the run `identity`, and keep the complete checkpoints of an earlier, equal run.

    Deletes the files of a run with another identity; without `resume`, deletes the files of any run. Raises UserError
    for a folder that contains something other than a run.
    """
    earlier = read_identity(folder)
    if earlier is not None and (not resume or earlier != dict(identity)):
        why = "it had other settings" if resume else "as requested"
        LOG.info("%s: discarding the interrupted run there (%s) and starting from the beginning", folder, why)
        _empty(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(folder / SETTINGS_FILE, canonical_json(dict(identity)))


def _empty(folder: Path) -> None:
    """Remove everything in `folder` except the lock file, which the caller may hold."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK_FILE:
            path.unlink()


def read_identity(folder: Path) -> object:
    """The identity of the run in `folder`; None if the folder is new or empty.

    Raises UserError if the folder contains something other than a run.
    """
    if not folder.exists() or (folder.is_dir() and all(path.name == LOCK_FILE for path in folder.iterdir())):
        return None
    try:
        identity: object = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"{folder} exists but is not an interrupted run; remove it yourself, or give another --output"
        ) from None
    return identity


def last_complete(folder: Path) -> Path | None:
    """The last complete checkpoint in `folder`, if there is one; incomplete ones are removed."""
    numbered = {
        int(match[1]): path for path in folder.iterdir() if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    last = None
    for _, path in sorted(numbered.items()):
        if is_complete(path):
            last = path
        else:
            LOG.info("%s is incomplete and is removed", path)
            shutil.rmtree(path)
    return last


def steps_before(checkpoint: Path | None) -> int:
    """The number of optimiser steps that were made before `checkpoint` was written; 0 for None."""
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


def is_complete(checkpoint: Path) -> bool:
    """Whether `checkpoint` was declared complete and none of its files has changed since."""
    try:
        digests = json.loads((checkpoint / COMPLETE_FILE).read_text(encoding="utf-8"))
        return bool(digests == _digests(checkpoint))
    except (OSError, ValueError):
        return False


def mark_complete(checkpoint: Path) -> None:
    """Declare `checkpoint` complete."""
    write_text_atomic(checkpoint / COMPLETE_FILE, canonical_json(_digests(checkpoint)))


def _digests(checkpoint: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(checkpoint.iterdir()) if path.name != COMPLETE_FILE}


@dataclass(frozen=True)
class TrainingEnd:
    """How training ended."""

    steps: int
    """Optimiser steps that were made."""
    best: Path
    """The checkpoint with the best state."""


def mark_end(folder: Path, steps: int, best: Path) -> None:
    """Declare that training in `folder` ended after `steps`, and that the checkpoint `best` is its result."""
    write_text_atomic(folder / ENDED_FILE, canonical_json({"steps": steps, "best": best.name}))


def read_end(folder: Path) -> TrainingEnd | None:
    """How training in `folder` ended; None if it has not ended or the checkpoint of its result is incomplete."""
    try:
        record = json.loads((folder / ENDED_FILE).read_text(encoding="utf-8"))
        end = TrainingEnd(int(record["steps"]), folder / Path(record["best"]).name)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return end if is_complete(end.best) else None


class ProgressCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Marks checkpoints and the end of training, shows a progress bar, and logs the held-out loss."""

    def __init__(self, folder: Path, show: bool, processes: TrainingProcesses = SINGLE_PROCESS) -> None:
        self.folder, self.show, self.processes = folder, show and processes.is_first, processes
        self.bar: tqdm[Any] | None = None

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **unused: object) -> None:
        if state.global_step:
            LOG.info("continuing after step %d", state.global_step)
        self.bar = progress_bar(
            total=state.max_steps, initial=state.global_step, desc="finetune", unit="step", disable=not self.show
        )

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **unused: object) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_evaluate(
        self, args: TrainingArguments, state: Any, control: Any, metrics: Mapping[str, float], **unused: object
    ) -> None:
        line = f"step {state.global_step} of {state.max_steps}: held-out loss {metrics['eval_loss']:.4f} nats per token"
        training_losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        if self.bar is not None:
            self.bar.clear()  # so that the line is not written after the bar
        LOG.info("%s%s", line, f", training loss {training_losses[-1]:.4f}" if training_losses else "")

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **unused: object) -> None:
        self.processes.wait()  # until each process has written its random state
        if not self.processes.is_first:
            return
        if control.should_training_stop and state.best_model_checkpoint is not None:
            mark_end(self.folder, state.global_step, Path(state.best_model_checkpoint))
        mark_complete(self.folder / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **unused: object) -> None:
        if self.bar is not None:
            self.bar.close()
