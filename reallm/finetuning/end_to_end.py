"""The stage "end-to-end": train all parts of the model at once on the loss of the model's output."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor
from transformers import EarlyStoppingCallback

from .checkpoints import ProgressCallback, steps_before
from .distillation import (
    DistillationLoss,
    DistillationTrainer,
    FinalEvaluation,
    NotFiniteError,
    training_arguments,
    training_order,
)
from .processes import TrainingProcesses
from .resolved_settings import ResolvedSettings
from .student_teacher import StudentTeacher, TrainingData
from .trainable_parts import TrainableParts

LOG = logging.getLogger(__name__)


def train_end_to_end(
    pair: StudentTeacher,
    parts: TrainableParts,
    settings: ResolvedSettings,
    folder: Path,
    checkpoint: Path | None,
    processes: TrainingProcesses,
) -> int:
    """Train from `checkpoint` on (None: from the start) and return the number of steps that were made.

    Checkpoints are written to `folder`. At the end the model has the state with the lowest held-out loss. A loss that
    is not finite ends training; the model then has the best checkpoint's state or, before the first, the current one.
    """
    pair.free_teacher(remaining_windows(pair.data, settings, checkpoint, processes))
    trainer = _trainer(pair, parts, settings, folder, processes)
    try:
        trainer.train_or_resume(folder, checkpoint)
    except NotFiniteError as error:
        best = trainer.load_best_state()
        state = "the state before that step is kept" if best is None else f"{best}, the best held-out state, is loaded"
        LOG.warning("%s: training stops there, and %s", error, state)
    return int(trainer.state.global_step)


def remaining_windows(
    data: TrainingData, settings: ResolvedSettings, checkpoint: Path | None, processes: TrainingProcesses
) -> Tensor:
    """The rows of `data.train` that this process takes after `checkpoint`, in order, int64 [n]."""
    rows = processes.share_of(_all_windows(data, settings, processes), settings.batch_size)
    return rows[steps_before(checkpoint) * settings.batch_size :]


def _all_windows(data: TrainingData, settings: ResolvedSettings, processes: TrainingProcesses) -> Tensor:
    """The rows of `data.train` that the steps of all processes take, in order, int64 [n]."""
    total = processes.count * settings.steps * settings.batch_size
    return training_order(len(data.train.tokens), total, settings.seed)


def _trainer(
    pair: StudentTeacher,
    parts: TrainableParts,
    settings: ResolvedSettings,
    folder: Path,
    processes: TrainingProcesses,
) -> DistillationTrainer:
    callbacks = [FinalEvaluation(), ProgressCallback(folder, LOG.isEnabledFor(logging.INFO), processes)]
    if settings.patience:
        callbacks.append(EarlyStoppingCallback(settings.patience))
    return DistillationTrainer(
        DistillationLoss(pair.objective, parts.parameter_groups(), parts.maps),
        arguments=training_arguments(
            folder,
            steps=settings.steps,
            batch_size=settings.batch_size,
            seed=settings.seed,
            device=pair.student.device,
        ),
        learning_rates=settings.learning_rates,
        train=pair.train[_all_windows(pair.data, settings, processes)],
        held_out=pair.held_out,
        callbacks=callbacks,
    )
