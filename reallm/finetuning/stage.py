"""`reallm finetune`: from an artifact, the model it was made from and a text to an artifact nearer to that model.

The last windows of the text are held out: they choose among the checkpoints, and between trained and fresh factors, and
the gain is measured on them. No evaluation text is touched. An artifact is written only if the gain is real.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..compiler import Compilation, write_artifact
from ..errors import UserError
from ..folder import check_output, is_artifact
from ..lock import alone_in
from ..manifest import MANIFEST_FILE, sha256_file
from ..planner.plan import Plan
from ..text import Text, load_text
from ..verification import read_plan
from .checkpoints import Progress, open_progress, progress_folder, read_settings
from .distillation import Distillation, FinalEvaluation, Student, training_arguments, training_order
from .factors import column_moments
from .pair import Pair, Training, open_pair
from .trained import Trained, check_parts
from .tuned import TrainedCodes, tuned_plan

LOG = logging.getLogger(__name__)
LEAST_GAIN = 1e-4
"""Share of the divergence that must go: the same weights summed in another order differ by less."""
MOMENT_WINDOWS = 8


@dataclass(frozen=True)
class Gain:
    """Divergence on the held-out windows, nats per token."""

    before: float
    started: float
    """With the fresh factors, untrained."""
    trained: float


def finetune(
    artifact: Path | str,
    *,
    text: str | None = None,
    output: Path | str,
    teacher: Path | str | None = None,
    train: Sequence[str] = ("factors", "scales", "norms"),
    rank: int = 8,
    factor_dtype: Literal["f16", "i8", "i4"] = "i8",
    steps: int = 200,
    batch_size: int = 1,
    seqlen: int = 512,
    learning_rate: float = 1e-3,
    seed: int = 0,
    device: str = "cpu",
    gradient_checkpointing: bool = False,
    resume: bool = True,
    kernels: bool = True,
    force: bool = False,
) -> Path:
    """Train `artifact` against the model it was made from, into the artifact `output`.

    `train` names what: "factors", "scales", "norms" (see `trained`). With factors, a compressed linear without a
    low-rank term gets one of `rank` in `factor_dtype`; 0 adds none, and then not one byte is added. `teacher` is that
    model, if it has moved since. One step is `batch_size` windows of `seqlen` tokens. An interrupted run goes on at its
    last checkpoint, in `<output>.partial`, unless `resume` is false. Raises UserError; when nothing was gained, nothing
    is written.
    """
    began, output = time.perf_counter(), Path(output)
    training = Training(check_parts(train), rank, factor_dtype, steps, batch_size, seqlen, learning_rate, seed)
    check_output(output, force)
    if not is_artifact(artifact):
        raise UserError(f"{artifact} is no artifact of reallm; `reallm compile` writes one")
    plan = read_plan(Path(artifact))
    source = load_text(text)
    pair = open_pair(Path(artifact), plan, teacher, source, training, device)
    folder = progress_folder(output)
    read_settings(folder)  # a folder that is no run is refused before it is touched
    with alone_in(folder):
        check_output(output, force)  # another process may have made it meanwhile
        checkpoint = open_progress(folder, _settings(plan, source, training, artifact), resume)
        trained = Trained(pair.model, pair.modules, training.train, training.term, pair.original.dtype)
        gain = train_pair(pair, trained, training, folder, checkpoint, gradient_checkpointing)
        after = min(gain.started, gain.trained)
        if not after < gain.before * (1 - LEAST_GAIN):
            shutil.rmtree(folder)
            raise UserError(
                f"{artifact}: after {steps} steps the KL on held-out windows is {after:.4f}, it was {gain.before:.4f}; "
                "nothing is written: try a smaller --learning-rate, more --steps, a higher --rank or more --text"
            )
        codes = TrainedCodes(pair.model)
        new = tuned_plan(plan, pair.original, codes, _notes(pair, training, source, gain))
        pair.original.model.to("cpu")
        write_artifact(
            Compilation(new, pair.original, codes, tuned=trained.tensors()), output, force=force, kernels=kernels
        )
        shutil.rmtree(folder)
    _report(plan, new, gain, time.perf_counter() - began)
    return output


def _settings(plan: Plan, source: Text, training: Training, artifact: Path | str) -> dict[str, int | float | str]:
    """What makes two runs the same run."""
    return asdict(training) | {
        "train": ",".join(training.train),
        "artifact_sha256": sha256_file(Path(artifact) / MANIFEST_FILE),
        "model_sha256": plan.model_sha256,
        "text_sha256": source.sha256,
    }


def train_pair(
    pair: Pair, trained: Trained, training: Training, folder: Path, checkpoint: Path | None, checkpointing: bool
) -> Gain:
    """Train, and leave the better of the trained and the fresh state folded into the model."""
    _freeze(pair, checkpointing)
    before = pair.divergence(training.seed)
    sample = pair.inputs(pair.train[:MOMENT_WINDOWS], training.seed)
    moments = column_moments(pair.model, pair.modules, sample) if training.term else {}
    parameters = trained.start(pair.original, moments)
    started = pair.divergence(training.seed) if training.term else before
    LOG.info("held-out KL %.4f nats per token, %.4f untrained", before, started)
    trainer = _trainer(pair, parameters, training, folder)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    after = _folded(pair, trained, training)
    if not after < started:
        LOG.warning("training did not help (%.4f): the untrained state is kept", after)
        trained.fresh()
    return Gain(before, started, after)


def _freeze(pair: Pair, checkpointing: bool) -> None:
    """No parameter of either model is trained; dropout stays off in both."""
    pair.original.model.requires_grad_(False)
    pair.model.requires_grad_(False)
    if checkpointing:
        renamed = getattr(pair.model, "activation_checkpointing_enable", None)  # by transformers on its way to 6
        (renamed or pair.model.gradient_checkpointing_enable)({"use_reentrant": False})
        for module in pair.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True  # the layer's own flag only: its dropout stays off


def _trainer(pair: Pair, parameters: Sequence[nn.Parameter], training: Training, folder: Path) -> Distillation:
    order = training_order(len(pair.train), training.steps * training.batch_size, training.seed)
    show = LOG.isEnabledFor(logging.INFO)
    return Distillation(
        Student(pair.model, parameters),
        pair.original.model,
        arguments=training_arguments(
            folder,
            steps=training.steps,
            batch_size=training.batch_size,
            learning_rate=training.learning_rate,
            seed=training.seed,
            device=pair.model.device,
        ),
        train=pair.inputs(pair.train, training.seed)[order],
        held_out=pair.inputs(pair.held_out, training.seed),
        callbacks=[FinalEvaluation(), Progress(folder, show)],
    )


def _folded(pair: Pair, trained: Trained, training: Training) -> float:
    """Held-out divergence with what was trained as it will be stored; infinite if it cannot be."""
    if not trained.finite():
        return math.inf
    try:
        trained.fold()
    except ValueError:  # beyond fp16
        return math.inf
    return pair.divergence(training.seed)


def _notes(pair: Pair, training: Training, source: Text, gain: Gain) -> list[str]:
    """What the plan and the model card say about it."""
    how = (
        f"trained for {training.steps} steps of {training.batch_size} x {training.seqlen} tokens at learning rate "
        f"{training.learning_rate:g} on {source.description}"
        if gain.trained < gain.started
        else f"left as they started, new factors by SVD on {source.description}; training did not lower the KL further"
    )
    after = min(gain.started, gain.trained)
    return [
        f"{', '.join(training.train)} of {len(pair.modules)} matrices were {how}",
        f"KL to the original on {len(pair.held_out)} held-out windows of that text: {gain.before:.4f} nats per token "
        f"before, {after:.4f} after",
        "costs, bound and predicted loss are those of the codes before that",
    ]


def _report(old: Plan, new: Plan, gain: Gain, seconds: float) -> None:
    after = min(gain.started, gain.trained)
    LOG.info("held-out KL %.4f before, %.4f after, nats per token; %.0f s", gain.before, after, seconds)
    sizes = (old.file_bytes, new.file_bytes, old.bits_per_weight, new.bits_per_weight)
    LOG.info("weights file %d bytes before, %d after; %.4f and %.4f bits per weight", *sizes)
