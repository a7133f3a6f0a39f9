"""Where an interrupted run goes on: the folder `<output>.partial`, and which checkpoints in it are whole.

A checkpoint counts once `whole.json` in it, written last, names every file with its sha256; one that was cut off is
removed. `ended.json` beside them says that training is over, and which checkpoint it came to: what remains is to write
the result. The Trainer reads its own checkpoints as safetensors and as tensors only (`weights_only`), never as pickles.
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

from .processes import ALONE, TrainingProcesses

LOG = logging.getLogger(__name__)
SETTINGS_FILE = "settings.json"
WHOLE_FILE = "whole.json"
ENDED_FILE = "ended.json"

Settings = Mapping[str, int | float | str]


def progress_folder(output: Path) -> Path:
    """The folder of the checkpoints on the way to `output`."""
    return output.with_name(f"{output.name}.partial")


def open_progress(folder: Path, settings: Settings, resume: bool) -> None:
    """Prepare `folder` for a run with `settings`; whole checkpoints of the same run stay (`last_whole`).

    A run with other settings, or any run without `resume`, is discarded. Raises UserError for a folder that is no run.
    """
    found = read_settings(folder)
    if found is not None and (not resume or found != dict(settings)):
        why = "with other settings" if resume else "as asked"
        LOG.info("%s: a run %s was interrupted there; starting anew", folder, why)
        _empty(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(folder / SETTINGS_FILE, canonical_json(dict(settings)))


def _empty(folder: Path) -> None:
    """Remove all in `folder` but the lock, which the caller may hold."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK_FILE:
            path.unlink()


def read_settings(folder: Path) -> object:
    """The settings of the run in `folder`; None for a new or empty folder. Raises UserError for one that is no run."""
    if not folder.exists() or (folder.is_dir() and all(path.name == LOCK_FILE for path in folder.iterdir())):
        return None
    try:
        found: object = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"{folder} exists and holds no interrupted run; remove it yourself, or give another --output"
        ) from None
    return found


def last_whole(folder: Path) -> Path | None:
    """The last whole checkpoint in `folder`, if there is one; those that were cut off are removed."""
    numbered = {
        int(match[1]): path for path in folder.iterdir() if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    last = None
    for _, path in sorted(numbered.items()):
        if is_whole(path):
            last = path
        else:
            LOG.info("%s was cut off and is left out", path)
            shutil.rmtree(path)
    return last


def steps_of(checkpoint: Path | None) -> int:
    """Steps that were made before `checkpoint`."""
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


def is_whole(checkpoint: Path) -> bool:
    """Whether every file of `checkpoint` is as it was when it was finished."""
    try:
        files = json.loads((checkpoint / WHOLE_FILE).read_text(encoding="utf-8"))
        return bool(files == _digests(checkpoint))
    except (OSError, ValueError):
        return False


def mark_whole(checkpoint: Path) -> None:
    """Declare `checkpoint` finished."""
    write_text_atomic(checkpoint / WHOLE_FILE, canonical_json(_digests(checkpoint)))


@dataclass(frozen=True)
class End:
    """How training ended: after `steps`, with the best state in the folder `best`."""

    steps: int
    best: Path


def mark_end(folder: Path, steps: int, best: Path) -> None:
    """Declare that the training in `folder` is over after `steps`, and `best`, a checkpoint in it, its result."""
    write_text_atomic(folder / ENDED_FILE, canonical_json({"steps": steps, "best": best.name}))


def read_end(folder: Path) -> End | None:
    """How the training in `folder` ended; None if it did not, or its result is not whole."""
    try:
        found = json.loads((folder / ENDED_FILE).read_text(encoding="utf-8"))
        end = End(int(found["steps"]), folder / Path(found["best"]).name)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return end if is_whole(end.best) else None


def _digests(checkpoint: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(checkpoint.iterdir()) if path.name != WHOLE_FILE}


class Progress(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Marks checkpoints and the end, shows a bar, and says how the held-out divergence develops."""

    def __init__(self, folder: Path, show: bool, ranks: TrainingProcesses = ALONE) -> None:
        self.folder, self.show, self.ranks = folder, show and ranks.first, ranks
        self.bar: tqdm[Any] | None = None

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **unused: object) -> None:
        if state.global_step:
            LOG.info("going on after step %d", state.global_step)
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="finetune", unit="step", disable=not self.show
        )

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **unused: object) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_evaluate(
        self, args: TrainingArguments, state: Any, control: Any, metrics: Mapping[str, float], **unused: object
    ) -> None:
        line = f"step {state.global_step} of {state.max_steps}: held-out loss {metrics['eval_loss']:.4f} nats per token"
        trained = [entry["loss"] for entry in state.log_history if "loss" in entry]
        if self.bar is not None:
            self.bar.clear()  # the line takes the bar's place
        LOG.info("%s%s", line, f", on the training text {trained[-1]:.4f}" if trained else "")

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **unused: object) -> None:
        self.ranks.wait()  # each has written the state of its random numbers
        if not self.ranks.first:
            return
        if control.should_training_stop and state.best_model_checkpoint is not None:
            mark_end(self.folder, state.global_step, Path(state.best_model_checkpoint))
        mark_whole(self.folder / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **unused: object) -> None:
        if self.bar is not None:
            self.bar.close()
