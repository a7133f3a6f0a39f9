"""`reallm finetune`: train an artifact so that its output gets closer to that of the dense model it was made from."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Any

from reallm.artifacts.peft_files import write_adapter
from reallm.compilation.compile import Compilation, write_artifact
from reallm.errors import UserError
from reallm.planner.tables.plan import Plan

from .checkpoints import last_complete, open_progress, read_identity
from .end_to_end import remaining_windows
from .gain import Gain, log_gain, plan_notes
from .new_plan import TrainedCodes, new_plan
from .processes import TrainingProcesses
from .run_inputs import RunInputs, open_inputs
from .settings import FinetuneSettings, with_overrides
from .stages import RunFolders, run_stages
from .student_teacher import StudentTeacher, TrainingData, open_student, open_training_data
from .trainable_parts import TrainableParts

LOG = logging.getLogger(__name__)


def finetune(
    artifact: Path | str,
    *,
    text: str | None = None,
    output: Path | str,
    settings: FinetuneSettings | None = None,
    **overrides: Any,
) -> Path:
    """Train `artifact` to match the dense model it was made from, and write the result to `output`.

    The codes do not change unless the stage "codes" computes new ones; scales, norms, codebooks and low-rank factors
    are trained to minimise the KL divergence from the dense model's output (with loss="text": the cross entropy of the
    text). The last windows of the text are held out: the loss on them decides which checkpoint is kept, whether the
    trained state replaces the untrained one, and what the gain is. If it does not fall, nothing is written.

    Checkpoints are kept in `<output>.partial` until the result is written; an interrupted run with the same settings
    and inputs continues from the last one. Several processes, started by `torchrun`, train together (`processes`).

    Parameters
    ----------
    artifact
        An artifact that `compile` or `finetune` wrote. It is verified first and not changed.
    text
        A .txt, .jsonl or .parquet file, or a dataset's name (see `reallm.text.corpus.load_text`); None for English
        text that comes with Python. In a .jsonl file of messages only the assistant's answers are trained on.
    output
        The folder to write: an artifact or, with the setting `adapter`, a LoRA adapter in PEFT's format that contains
        the change of the factors.
    settings
        What to train and how long; None for the defaults.
    overrides
        Single fields of FinetuneSettings, which take precedence over `settings`.

    Returns
    -------
    Path
        `output`.

    Raises
    ------
    UserError
        If an input is missing or damaged, settings contradict each other, or the held-out loss did not fall.
    TypeError
        If a keyword is not a field of FinetuneSettings.

    Examples
    --------
    >>> settings = reallm.FinetuneSettings(steps=8, seqlen=32, train=("scales", "norms"))
    >>> reallm.finetune("out", text="train.txt", output="tuned", settings=settings)
    PosixPath('tuned')
    """
    began = time.perf_counter()
    settings = with_overrides(settings, overrides)
    processes = TrainingProcesses.from_environment(settings.device)
    inputs = open_inputs(artifact, text, Path(output), settings, processes)
    data = open_training_data(inputs.artifact, inputs.plan, inputs.source, inputs.settings, processes)
    read_identity(inputs.progress)  # refuses a folder that is not a run before anything in it is changed
    processes.wait()  # until all have read it; then the first process may write
    with processes.exclusive_lock(inputs.progress):
        checkpoint = _open_progress(inputs, processes)
        pair, parts = _open_models(inputs, data, checkpoint, processes)
        folders = RunFolders(inputs.progress, inputs.measured, checkpoint)
        gain = run_stages(pair, parts, inputs.settings, folders, processes)
        processes.wait()  # until all have read what the first process is about to remove
        if not processes.is_first:
            return inputs.output
        result = _write_result(inputs, pair, parts, gain)
        shutil.rmtree(inputs.progress)
    log_gain(inputs.plan, result, gain, inputs.settings.loss_name, time.perf_counter() - began)
    return inputs.output


def _open_progress(inputs: RunInputs, processes: TrainingProcesses) -> Path | None:
    """Let the first process prepare the progress folder; return the last complete checkpoint, if any, in every
    process.
    """
    checkpoint = None
    if processes.is_first:
        inputs.check_output()  # another run may have written it while this one waited for the lock
        open_progress(inputs.progress, inputs.identity(), inputs.settings.resume)
        checkpoint = last_complete(inputs.progress)  # also removes incomplete ones
    processes.wait()
    return checkpoint if processes.is_first else last_complete(inputs.progress)


def _open_models(
    inputs: RunInputs, data: TrainingData, checkpoint: Path | None, processes: TrainingProcesses
) -> tuple[StudentTeacher, TrainableParts]:
    """Free the parts of the teacher that training does not need, then load the student."""
    settings = inputs.settings
    if settings.loss == "text":
        data.teacher.free_weights()
    elif settings.stages == ("end-to-end",):  # the other stages begin with the teacher's weights
        data.free_teacher(remaining_windows(data, settings, checkpoint, processes))
    pair = open_student(inputs.artifact, data, settings)
    parts = TrainableParts(
        pair.student,
        pair.linears,
        tuple(settings.train),
        settings.new_factors,
        pair.dense.dtype,
        settings.init,
        settings.dora,
    )
    return pair, parts


def _write_result(inputs: RunInputs, pair: StudentTeacher, parts: TrainableParts, gain: Gain) -> Plan:
    """Write the adapter or the artifact, and return the plan of the result. Raises UserError if nothing was gained."""
    settings = inputs.settings
    if not gain.is_real:
        shutil.rmtree(inputs.progress)
        raise UserError(
            f"{inputs.artifact}: after {gain.steps} steps the {settings.loss_name} on held-out windows is "
            f"{gain.after:.4f}; before, it was {gain.before:.4f}; nothing is written: try a smaller "
            "--learning-rate, more --steps, a higher --rank or more --text"
        )
    if settings.adapter:
        write_adapter(inputs.output, parts.added_factors(), inputs.artifact, settings.force, parts.magnitudes())
        return inputs.plan
    codes = TrainedCodes(pair.student)
    notes = plan_notes(gain, settings, inputs.source, len(pair.linears), len(pair.held_out.tokens))
    plan = new_plan(inputs.plan, pair.dense, codes, notes)
    pair.dense.model.to("cpu")
    result = Compilation(plan, pair.dense, codes, tuned=parts.stored_tensors())
    write_artifact(result, inputs.output, force=settings.force, kernels=settings.kernels)
    return plan
