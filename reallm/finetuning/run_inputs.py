"""The inputs of a fine-tuning run, checked before a model is loaded or anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from reallm.artifacts.adapter_layout import CONFIG_FILE
from reallm.artifacts.directory import check_output, read_config
from reallm.artifacts.find import plan_of, require_artifact
from reallm.artifacts.manifest import MANIFEST_FILE, sha256_file
from reallm.artifacts.verify import verify
from reallm.errors import UserError
from reallm.kernels.formats.codecs import DenseCodec
from reallm.kernels.formats.formats import Format
from reallm.models.sentence_encoder import is_backbone
from reallm.planner.tables.plan import Choice, Plan
from reallm.planner.tables.work_folder import find_table
from reallm.text.corpus import Text, load_text

from .checkpoints import RunIdentity, progress_folder
from .processes import TrainingProcesses
from .resolved_settings import ResolvedSettings, resolve
from .settings import FinetuneSettings
from .trainable_parts import formats_have, nothing_to_train


@dataclass(frozen=True)
class RunInputs:
    """The checked inputs of one run."""

    artifact: Path
    output: Path
    plan: Plan
    """The plan of `artifact`."""
    source: Text
    settings: ResolvedSettings
    measured: Path | None
    """The file of the measured table that the stage "codes" needs; None where no stage needs it."""

    @property
    def progress(self) -> Path:
        """The folder of the run's checkpoints."""
        return progress_folder(self.output)

    def check_output(self) -> None:
        """Raise UserError if the output exists and may not be replaced."""
        _check_output(self.output, self.settings)

    def identity(self) -> RunIdentity:
        """Everything that decides the result: a run is resumed only if its identity is equal to this one."""
        return self.settings.deciding_values() | {
            "artifact_sha256": sha256_file(self.artifact / MANIFEST_FILE),
            "model_sha256": self.plan.model_sha256,
            "text_sha256": self.source.sha256,
        }


def open_inputs(
    artifact: Path | str, text: str | None, output: Path, settings: FinetuneSettings, processes: TrainingProcesses
) -> RunInputs:
    """Check that `artifact` can be fine-tuned into `output` with `settings`, and load the text.

    Raises UserError if it cannot.
    """
    _check_output(output, settings)
    plan, artifact = plan_of(require_artifact(artifact)), require_artifact(artifact)
    verify(artifact, adapters=False)
    _check_predicts_tokens(artifact)
    linears = [(Format.parse(c.format), c.rows, c.cols) for c in plan.choices if _is_compressed_linear(c)]
    if not linears:
        raise UserError(f"{artifact} has no compressed linear, so there is nothing to train")
    resolved = resolve(settings, plan)
    if processes.count > 1 and resolved.stages != ("end-to-end",):
        stages = ",".join(resolved.stages)
        raise UserError(f"--stages {stages}: {processes.count} processes can only run end-to-end; start one process")
    if not formats_have(resolved.train, resolved.new_factors, linears):
        raise nothing_to_train(resolved.train)
    measured = None
    if "codes" in resolved.stages or settings.work is not None:
        measured = find_table(plan, artifact, settings.work)
    return RunInputs(artifact, output, plan, load_text(text), resolved, measured)


def _check_output(output: Path, settings: FinetuneSettings) -> None:
    check_output(output, settings.force, CONFIG_FILE if settings.adapter else MANIFEST_FILE)


def _check_predicts_tokens(artifact: Path) -> None:
    """Raise UserError for an encoder without an output layer for tokens, which has no predictions to learn from."""
    name = str((read_config(artifact).get("architectures") or [""])[0])
    if is_backbone(name):
        raise UserError(
            f"{artifact} is a {name}, which predicts no tokens; expected a language model: train adapters and a head "
            "on labelled text with PEFT"
        )


def _is_compressed_linear(choice: Choice) -> bool:
    return choice.kind in ("linear", "head") and not isinstance(Format.parse(choice.format).codec, DenseCodec)
