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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from torch import Tensor
from transformers import EarlyStoppingCallback

from reallm.artifacts.directory import check_output, is_artifact
from reallm.artifacts.manifest import MANIFEST_FILE, sha256_file
from reallm.artifacts.peft_files import CONFIG_FILE, write_adapter
from reallm.artifacts.verify import read_plan
from reallm.artifacts.verify import verify as verify_artifact
from reallm.compilation.compile import Compilation, write_artifact
from reallm.errors import UserError
from reallm.kernels.formats.codecs import DenseCodec
from reallm.kernels.formats.formats import Format
from reallm.planner.tables.measured_table import TABLE_FILE, MeasuredTable
from reallm.planner.tables.plan import Choice, Plan
from reallm.planner.tables.records import read_record
from reallm.text.corpus import Text, load_text

from .blockwise import train_blocks
from .checkpoints import Progress, last_whole, open_progress, progress_folder, read_settings, steps_of
from .distillation import Distillation, FinalEvaluation, NotFiniteError, Student, training_arguments, training_order
from .factors import column_moments
from .new_plan import TrainedCodes, new_plan
from .pair import Pair, Training, Windows, checkpoint_activations, open_pair, open_windows
from .processes import ALONE, TrainingProcesses
from .recode import recode
from .stages import Stage, check_order, in_words, worthwhile_steps
from .trained import Trained, check_parts, formats_hold, nothing_of

LOG = logging.getLogger(__name__)
LEAST_GAIN = 1e-4
"""Share of the divergence that must go: the same weights summed in another order differ by less."""
MOMENT_WINDOWS = 8
ADAPTER_RANK = 8


@dataclass(frozen=True)
class Gain:
    """Divergence on the held-out windows, nats per token."""

    before: float
    started: float
    """With the fresh factors, untrained."""
    trained: float
    steps: int
    """Of training, until it ended."""
    gain_rate: float
    """The peak learning rate of scales and norms."""
    order: tuple[Stage, ...]
    """The stages it took, without new codes that were put back."""


def finetune(
    artifact: Path | str,
    *,
    text: str | None = None,
    output: Path | str,
    teacher: Path | str | None = None,
    train: Sequence[str] = ("factors", "scales", "norms"),
    rank: int | None = None,
    factor_dtype: Literal["f16", "i8", "i4"] = "i8",
    init: Literal["zero", "loftq", "lq-lora", "plan"] = "lq-lora",
    steps: int | None = None,
    batch_size: int = 1,
    seqlen: int = 512,
    learning_rate: float = 1e-3,
    gain_learning_rate: float | None = None,
    loss: Literal["kl", "text"] = "kl",
    patience: int = 3,
    seed: int = 0,
    order: Sequence[str] = ("end-to-end",),
    block_windows: int = 64,
    block_epochs: int = 2,
    code_steps: int = 4,
    code_learning_rate: float = 1e-4,
    work: Path | str | None = None,
    device: str = "cpu",
    gradient_checkpointing: bool = False,
    resume: bool = True,
    kernels: bool = True,
    force: bool = False,
    adapter: bool = False,
    dora: bool = False,
) -> Path:
    """Train `artifact` against the model it was made from, into the artifact `output`.

    `train` names what: "factors", "scales", "norms", "codebooks", "embeddings" (see `trained`). With factors, a
    compressed linear without a low-rank term gets one of `rank` in `factor_dtype`; 0, the default but for an adapter,
    adds none, and then not one byte is added. `teacher` is that model, if it has moved since. One step is `batch_size`
    windows of `seqlen` tokens. Training ends when `patience` evaluations in turn brought no lower held-out KL (0:
    never), or at a loss that is not finite; the best state is kept. An interrupted run goes on at its last checkpoint,
    in `<output>.partial`, unless `resume` is false. Raises UserError; when nothing was gained, nothing is written.

    `init` says where new factors start (`factors`). With `adapter`, `output` is a LoRA adapter in PEFT's form that
    holds the change of the factors alone, and no artifact: `train` is then "factors", in fp16. With `dora` it holds
    magnitudes of the rows too, trained beside the factors (arXiv 2402.09353).

    `order` holds the stages: "codes" (`recoding`), first, codes the blocks anew, one after another, with `code_steps`
    steps of training for the weights behind each, and reads the measured folder `work` (default: the plan's); "blocks"
    (`blockwise`) takes `block_epochs` times `block_windows` windows for every block and needs the memory of one;
    "end-to-end" is the training described above. `steps` None is 60, 160 for a plan that is predicted to lose .3 nats
    or more. `gain_learning_rate` None is a 120th of the divergence before it, 5e-3 at most.

    `loss` "kl" is the divergence from that model; "text" the cross entropy of the text's next tokens, which teaches
    what that model does not know. Of a .jsonl of messages only the assistant's answers count (`answers`).
    """
    began, output, ranks = time.perf_counter(), Path(output), TrainingProcesses.found(device)
    if dora and not adapter:
        raise UserError("--dora: magnitudes of rows are stored in adapters only; give --adapter too")
    if adapter:
        train, factor_dtype = ("factors",), "f16"
    mark = CONFIG_FILE if adapter else MANIFEST_FILE
    check_output(output, force, mark)
    if not is_artifact(artifact):
        raise UserError(f"{artifact} is no artifact of reallm; `reallm compile` writes one")
    verify_artifact(Path(artifact), adapters=False)
    plan = read_plan(Path(artifact))
    if not any(_trainable(choice) for choice in plan.choices):
        raise UserError(f"{artifact} has no compressed linear, so there is nothing to train")
    training = Training(
        train=check_parts(train),
        rank=(ADAPTER_RANK if adapter else 0) if rank is None else rank,
        factor_dtype=factor_dtype,
        init=init,
        steps=worthwhile_steps(plan) if steps is None else steps,
        batch_size=batch_size,
        seqlen=seqlen,
        learning_rate=learning_rate,
        gain_learning_rate=gain_learning_rate,
        loss=loss,
        patience=patience,
        seed=seed,
        order=check_order(order),
        block_windows=block_windows,
        block_epochs=block_epochs,
        code_steps=code_steps,
        code_learning_rate=code_learning_rate,
        dora=dora,
    )
    if ranks.count > 1 and training.order != ("end-to-end",):
        raise UserError(f"--order {','.join(training.order)}: of {ranks.count} processes only end-to-end makes use")
    if adapter and "codes" in training.order:
        raise UserError("--order codes makes another artifact, which no --adapter can hold")
    linears = [(Format.parse(c.format), c.rows, c.cols) for c in plan.choices if _trainable(c)]
    if not formats_hold(training.train, training.term, linears):
        raise nothing_of(training.train)
    measured = Path(work or plan.work)
    if "codes" in training.order or work is not None:  # what is missing is told before anything is loaded
        read_record(measured / TABLE_FILE, MeasuredTable, "measure")
    source = load_text(text)
    windows = open_windows(Path(artifact), plan, teacher, source, training, device, ranks)
    folder, settings = progress_folder(output), _settings(plan, source, training, artifact)
    read_settings(folder)  # a folder that is no run is refused before it is touched
    ranks.wait()  # all have read it before the first one writes
    with ranks.exclusive_lock(folder):
        if ranks.first:
            check_output(output, force, mark)  # another process may have made it meanwhile
            open_progress(folder, settings, resume)
            checkpoint = last_whole(folder)  # removes what was cut off
        ranks.wait()
        if not ranks.first:
            checkpoint = last_whole(folder)
        if training.loss == "text":
            windows.original.release()
        elif training.order == ("end-to-end",):  # else a stage soon needs the weights
            windows.release(_to_come(windows, training, checkpoint, ranks))
        pair = open_pair(Path(artifact), windows, training, low_memory=gradient_checkpointing)
        trained = Trained(
            pair.model, pair.modules, training.train, training.term, pair.original.dtype, training.init, dora
        )
        gain = train_pair(pair, trained, training, folder, checkpoint, gradient_checkpointing, measured, ranks)
        after = min(gain.started, gain.trained)
        ranks.wait()  # all have read what the first is about to remove
        if not ranks.first:
            return output
        if not after < gain.before * (1 - LEAST_GAIN):
            shutil.rmtree(folder)
            raise UserError(
                f"{artifact}: after {gain.steps} steps the {training.measure} on held-out windows is {after:.4f}, it "
                f"was {gain.before:.4f}; nothing is written: try a smaller --learning-rate, more --steps, a "
                "higher --rank or more --text"
            )
        if adapter:
            write_adapter(output, trained.added_factors(), Path(artifact), force, trained.magnitudes())
            shutil.rmtree(folder)
            LOG.info("held-out %s %.4f before, %.4f with the adapter", training.measure, gain.before, after)
            return output
        codes = TrainedCodes(pair.model)
        new = new_plan(plan, pair.original, codes, _notes(pair, training, source, gain))
        pair.original.model.to("cpu")
        write_artifact(
            Compilation(new, pair.original, codes, tuned=trained.tensors()), output, force=force, kernels=kernels
        )
        shutil.rmtree(folder)
    _report(plan, new, gain, training.measure, time.perf_counter() - began)
    return output


def _trainable(choice: Choice) -> bool:
    return choice.kind in ("linear", "head") and not isinstance(Format.parse(choice.format).codec, DenseCodec)


def _settings(plan: Plan, source: Text, training: Training, artifact: Path | str) -> dict[str, int | float | str]:
    """What makes two runs the same run."""
    return asdict(training) | {
        "train": ",".join(training.train),
        "order": ",".join(training.order),
        "artifact_sha256": sha256_file(Path(artifact) / MANIFEST_FILE),
        "model_sha256": plan.model_sha256,
        "text_sha256": source.sha256,
    }


def train_pair(
    pair: Pair,
    trained: Trained,
    training: Training,
    folder: Path,
    checkpoint: Path | None,
    checkpointing: bool,
    work: Path,
    ranks: TrainingProcesses = ALONE,
) -> Gain:
    """Train, and leave the better of the trained and the fresh state folded into the model.

    `work` is the measured folder, which new codes read.
    """
    _freeze(pair, checkpointing)
    before = coded = pair.held_out_loss()
    order = training.order
    if "codes" in order:
        pair.restore()
        coded = recode(pair, work, training, folder, before, checkpointing=checkpointing)
        if not coded < before:
            order = tuple(stage for stage in order if stage != "codes")
    training = replace(training, gain_learning_rate=training.gain_rate(coded))
    if order in ((), ("codes",)):
        return Gain(before, coded, coded, 0, training.gain_rate(coded), order)
    sample = pair.train[:MOMENT_WINDOWS].tokens
    moments = column_moments(pair.model, pair.modules, sample) if training.term and training.init == "lq-lora" else {}
    if training.term and training.init != "zero":
        pair.restore()
    trained.start(pair.original, moments)
    started = pair.held_out_loss(trained.maps) if training.term else coded
    LOG.info("held-out loss %.4f nats per token, %.4f untrained", before, started)
    steps = 0
    for stage in order:
        if stage == "codes":
            continue
        if stage == "blocks":
            pair.restore()
            train_blocks(pair, trained, training, folder)
            LOG.info("held-out loss %.4f nats per token after the blocks", pair.held_out_loss(trained.maps))
        else:
            pair.release(_to_come(pair.windows, training, checkpoint, ranks))
            trainer = _trainer(pair, trained, training, folder, ranks)
            steps = _train_end_to_end(trainer, folder, checkpoint)
    after = _folded(pair, trained)
    if ranks.first:
        pair.restore()  # what is not compressed goes into the file
    if not after < started:
        LOG.warning("training did not help (%.4f): the untrained state is kept", after)
        trained.fresh()
    return Gain(before, started, after, steps, training.gain_rate(coded), order)


def _rows(windows: Windows, training: Training, ranks: TrainingProcesses) -> Tensor:
    """The windows that the steps of all processes take, in order, int64 [n]."""
    return training_order(len(windows.train.tokens), ranks.count * training.steps * training.batch_size, training.seed)


def _to_come(windows: Windows, training: Training, checkpoint: Path | None, ranks: TrainingProcesses) -> Tensor:
    """Those that this process takes after `checkpoint`."""
    own = ranks.own(_rows(windows, training, ranks), training.batch_size)
    return own[steps_of(checkpoint) * training.batch_size :]


def _train_end_to_end(trainer: Distillation, folder: Path, checkpoint: Path | None) -> int:
    """Train from the last checkpoint on, if there is one; the number of steps made."""
    try:
        trainer.go_on(folder, checkpoint)
    except NotFiniteError as error:
        LOG.warning("%s: training ends there, and %s", error, _last_good(trainer))
    return int(trainer.state.global_step)


def _freeze(pair: Pair, checkpointing: bool) -> None:
    """No parameter of either model is trained; dropout stays off in both."""
    pair.original.model.requires_grad_(False)
    pair.model.requires_grad_(False)
    if checkpointing:
        checkpoint_activations(pair.model)


def _last_good(trainer: Distillation) -> str:
    """Go back to the best checkpoint, if there is one; what the state in memory is, in words."""
    best = trainer.state.best_model_checkpoint
    if best is None:
        return "the state before that step is tried"
    trainer._load_best_model()
    return f"the state of {Path(best).name} is taken, the best on the held-out windows"


def _trainer(pair: Pair, trained: Trained, training: Training, folder: Path, ranks: TrainingProcesses) -> Distillation:
    callbacks = [FinalEvaluation(), Progress(folder, LOG.isEnabledFor(logging.INFO), ranks)]
    if training.patience:
        callbacks.append(EarlyStoppingCallback(training.patience))
    return Distillation(
        Student(pair.objective, trained.groups(), trained.maps),
        arguments=training_arguments(
            folder,
            steps=training.steps,
            batch_size=training.batch_size,
            seed=training.seed,
            device=pair.model.device,
        ),
        rates=training.rates,
        train=pair.train[_rows(pair.windows, training, ranks)],
        held_out=pair.held_out,
        callbacks=callbacks,
    )


def _folded(pair: Pair, trained: Trained) -> float:
    """Held-out divergence with what was trained as it will be stored; infinite if it cannot be."""
    if not trained.finite():
        return math.inf
    try:
        trained.fold()
    except ValueError:  # beyond fp16
        return math.inf
    return pair.held_out_loss()


def _notes(pair: Pair, training: Training, source: Text, gain: Gain) -> list[str]:
    """What the plan and the model card say about it."""
    helped = gain.trained < gain.started
    stages = gain.order if helped else tuple(stage for stage in gain.order if stage == "codes")
    how = (
        f"trained {in_words(training, stages, gain.steps)} at learning rates "
        f"{training.learning_rate:g} and {gain.gain_rate:.2g} on {source.description}"
        if stages
        else f"left as they started, new factors from {source.description}"
    )
    if not helped and gain.order != stages:
        how += "; training did not lower the loss further"
    after = min(gain.started, gain.trained)
    return [
        f"{', '.join(training.train)} of {len(pair.modules)} matrices were {how}",
        f"{training.measure} on {len(pair.held_out.tokens)} held-out windows of that text: {gain.before:.4f} nats per "
        f"token before, {after:.4f} after",
        "costs, bound and predicted loss are those of the codes before that",
    ]


def _report(old: Plan, new: Plan, gain: Gain, measure: str, seconds: float) -> None:
    after = min(gain.started, gain.trained)
    LOG.info("held-out %s %.4f before, %.4f after, nats per token; %.0f s", measure, gain.before, after, seconds)
    sizes = (old.file_bytes, new.file_bytes, old.bits_per_weight, new.bits_per_weight)
    LOG.info("weights file %d bytes before, %d after; %.4f and %.4f bits per weight", *sizes)
