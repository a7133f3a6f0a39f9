"""The stages of one run, in order: new codes, training block by block, training end to end, and write-back into
bytes.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path

from .blockwise import train_blocks
from .end_to_end import train_end_to_end
from .factors import input_moments
from .gain import Gain
from .processes import SINGLE_PROCESS, TrainingProcesses
from .recode import recode
from .resolved_settings import ResolvedSettings
from .settings import Stage
from .student_teacher import StudentTeacher, checkpoint_activations
from .trainable_parts import TrainableParts

LOG = logging.getLogger(__name__)
MOMENT_WINDOWS = 8
"""Number of windows over which "lq-lora" averages the input moments."""


@dataclass(frozen=True)
class RunFolders:
    """The folders that a run reads and writes before it writes the result."""

    progress: Path
    """Checkpoints of this run."""
    measured: Path | None
    """The file of the plan's measured table, which the stage "codes" reads; None where that stage is not run."""
    checkpoint: Path | None = None
    """The last complete checkpoint in `progress`; None for a new run."""


def run_stages(
    pair: StudentTeacher,
    parts: TrainableParts,
    settings: ResolvedSettings,
    folders: RunFolders,
    processes: TrainingProcesses = SINGLE_PROCESS,
) -> Gain:
    """Run the stages of `settings`, then store the better of the initial and the trained state in the student.

    Raises UserError if there is nothing to train, or a stage cannot be run.
    """
    _freeze(pair, settings.gradient_checkpointing)
    before = pair.held_out_loss()
    encoded, stages = _renew_codes(pair, settings, folders, before)
    settings = replace(settings, gain_learning_rate=settings.gain_rate(encoded))
    gain_rate = settings.gain_rate(encoded)
    if stages in ((), ("codes",)):
        return Gain(before, encoded, encoded, 0, gain_rate, stages)
    started = _start(pair, parts, settings, encoded)
    LOG.info("held-out loss: %.4f nats per token before, %.4f with the initial values", before, started)
    steps = 0
    for stage in stages:
        if stage == "blocks":
            pair.reload_teacher()
            train_blocks(pair, parts, settings, folders.progress)
            LOG.info("held-out loss: %.4f nats per token after the blocks", pair.held_out_loss(parts.maps))
        elif stage == "end-to-end":
            steps = train_end_to_end(pair, parts, settings, folders.progress, folders.checkpoint, processes)
    trained = _write_back(pair, parts)
    if processes.is_first:
        pair.reload_teacher()  # its uncompressed tensors go into the artifact
    if not trained < started:
        LOG.warning("training did not help (%.4f): the untrained state is kept", trained)
        parts.reset_to_initial()
    return Gain(before, started, trained, steps, gain_rate, stages)


def _freeze(pair: StudentTeacher, gradient_checkpointing: bool) -> None:
    """Freeze all parameters of both models; dropout stays off, as it is after loading."""
    pair.dense.model.requires_grad_(False)
    pair.student.requires_grad_(False)
    if gradient_checkpointing:
        checkpoint_activations(pair.student)


def _renew_codes(
    pair: StudentTeacher, settings: ResolvedSettings, folders: RunFolders, before: float
) -> tuple[float, tuple[Stage, ...]]:
    """Run the stage "codes" if the settings contain it; return the held-out loss and the list of effective stages.

    New codes that do not lower the loss are discarded, and "codes" is then left out of the list.
    """
    stages = tuple(settings.stages)
    if "codes" not in stages:
        return before, stages
    assert folders.measured is not None
    pair.reload_teacher()
    encoded = recode(pair, folders.measured, settings, folders.progress, before)
    return encoded, stages if encoded < before else tuple(stage for stage in stages if stage != "codes")


def _start(pair: StudentTeacher, parts: TrainableParts, settings: ResolvedSettings, encoded: float) -> float:
    """Make the parts trainable; return the held-out loss with their initial values.

    Without new factors these values change nothing, so the result is `encoded`, the loss of the model as encoded.
    """
    sample = pair.train[:MOMENT_WINDOWS].tokens
    uses_moments = settings.new_factors is not None and settings.init == "lq-lora"
    moments = input_moments(pair.student, pair.linears, sample) if uses_moments else {}
    if settings.new_factors and settings.init != "zero":
        pair.reload_teacher()
    parts.start(pair.dense, moments)
    return pair.held_out_loss(parts.maps) if settings.new_factors else encoded


def _write_back(pair: StudentTeacher, parts: TrainableParts) -> float:
    """Write the trained values back; return the held-out loss with the stored values, or infinity if they do not
    fit.
    """
    if not parts.is_finite():
        return math.inf
    try:
        parts.write_back()
    except ValueError:  # beyond the range of fp16
        return math.inf
    return pair.held_out_loss()
