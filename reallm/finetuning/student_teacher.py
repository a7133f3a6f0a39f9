"""The two models of distillation, student (packed) and teacher (dense), and the windows that they are compared on.

The last windows of the text are held out. Both models compute in bfloat16 if the dense model uses it and the machine
computes fast in it, and in float32 otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from reallm.artifacts.quantization_config import DecodeMode
from reallm.compilation.plan_model import load_plan_model
from reallm.errors import UserError
from reallm.models.loaded import LoadedModel
from reallm.planner.tables.plan import Plan
from reallm.runtime.load import load
from reallm.system.device import parse_device
from reallm.text.corpus import Text
from reallm.text.masking import mask_token_of, mask_window

from .chat_windows import SampledWindows, sample_windows
from .embedding_maps import EmbeddingMaps
from .factors import PackedLinears, trainable_linears
from .objective import Objective
from .processes import TrainingProcesses
from .resolved_settings import ResolvedSettings
from .teacher import Teacher

HELD_OUT_WINDOWS = 8
"""Maximum number of windows that are held out."""
HELD_OUT_SHARE = 8
"""At most one window in HELD_OUT_SHARE is held out, but always at least one."""


@dataclass(frozen=True)
class TrainingData:
    """The teacher and the windows of the text, before the compressed model is loaded."""

    teacher: Teacher
    train: SampledWindows
    held_out: SampledWindows
    """Disjoint from `train`."""

    def free_teacher(self, rows: Tensor) -> None:
        """Cache the teacher's hidden states on the held-out windows and the windows `rows`, int64 [n], of `train`.

        Then free the teacher's weights. If the states do not fit into the cache, nothing is done.
        """
        tokens, window_ids = self.needed_windows(rows)
        if self.teacher.cache_all(tokens, window_ids):
            self.teacher.free_weights()

    def needed_windows(self, rows: Tensor) -> tuple[Tensor, list[int]]:
        """Token ids and window ids of the held-out windows and the training windows `train[rows]`, no duplicates."""
        parts = [self.train[torch.unique(rows)], self.held_out]
        return torch.cat([part.tokens for part in parts]), [i for part in parts for i in part.window_ids.tolist()]


@dataclass(frozen=True)
class StudentTeacher:
    """The packed model, the dense model it was made from, and the windows they are compared on."""

    data: TrainingData
    student: PreTrainedModel
    linears: PackedLinears
    """The compressed linears of the student, by name."""
    objective: Objective

    @property
    def dense(self) -> LoadedModel:
        """The dense model; its weights may be freed (see `reload_teacher`)."""
        return self.data.teacher.loaded

    @property
    def train(self) -> SampledWindows:
        """The windows that are trained on."""
        return self.data.train

    @property
    def held_out(self) -> SampledWindows:
        """The windows that the gain is measured on."""
        return self.data.held_out

    @torch.no_grad()
    def held_out_loss(self, maps: EmbeddingMaps | None = None) -> float:
        """Mean loss of the student on the held-out windows, nats per token; `maps` are embedding maps in training."""
        device, total = self.student.device, 0.0
        for index in range(len(self.held_out.tokens)):
            window = self.held_out[index : index + 1]
            scored = None if window.scored is None else window.scored.to(device)
            total += float(self.objective(window.tokens.to(device), window.window_ids.tolist(), scored, maps))
        return total / len(self.held_out.tokens)

    def free_teacher(self, rows: Tensor) -> None:
        """Free the teacher's weights, except its head, if training does not need them.

        `rows`, int64 [n], are the windows of `train` to train on. `reload_teacher` reads the weights again.
        """
        if self.objective.teacher_fits_in_cache(*self.data.needed_windows(rows)):
            self.data.teacher.free_weights()

    def reload_teacher(self) -> None:
        """Read the teacher's weights again, if they were freed."""
        self.data.teacher.reload_weights()


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute the activations in the backward pass instead of keeping them."""
    renamed = getattr(model, "activation_checkpointing_enable", None)  # the name in newer versions of transformers
    (renamed or model.gradient_checkpointing_enable)({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True  # the layer's own flag only: its dropout stays off


def open_training_data(
    artifact: Path, plan: Plan, source: Text, settings: ResolvedSettings, processes: TrainingProcesses
) -> TrainingData:
    """Load the model that `artifact` was made from and cut the text into windows; the last ones are held out.

    Raises UserError if the model is missing or is not the right one, or if the text has fewer than two windows.
    """
    device = processes.own_device(parse_device(settings.device, ("cpu", "cuda")))  # the Trainer supports no others
    dense = load_plan_model(plan, artifact, settings.teacher, "--teacher")
    sample = _sample(dense, source, settings.seqlen)
    mask_token = mask_token_of(dense.model, _tokenizer(dense), dense.source)
    if mask_token is not None:
        if settings.loss == "text":
            raise UserError(f"--loss text: {dense.source} predicts masked tokens, not the next one; expected kl")
        masked = [mask_window(window, mask_token, settings.seed + i).inputs for i, window in enumerate(sample.tokens)]
        sample = replace(sample, tokens=torch.cat(masked))
    count = min(HELD_OUT_WINDOWS, max(1, len(sample.tokens) // HELD_OUT_SHARE))
    teacher = Teacher(dense, sample.tokens[:1], device, compute_dtype(dense.dtype, device), processes)
    return TrainingData(teacher, sample[:-count], sample[-count:])


def open_student(artifact: Path, data: TrainingData, settings: ResolvedSettings) -> StudentTeacher:
    """Load the compressed model, which must have been verified, beside its teacher.

    With gradient checkpointing the student keeps no decoded weights.
    """
    teacher = data.teacher
    decode: DecodeMode = "call" if settings.gradient_checkpointing else "load"
    student, _ = load(artifact, device=teacher.device, dtype=teacher.dtype, decode=decode, verify=False)
    linears = trainable_linears(student)
    objective = Objective(student, teacher, data.train.tokens[:1], settings.loss)
    if objective.head is None and settings.loss == "kl":
        teacher.reload_weights()  # the loss needs the teacher's logits, which its hidden states cannot give
    return StudentTeacher(data, student, linears, objective)


def _tokenizer(dense: LoadedModel) -> PreTrainedTokenizerBase:
    if dense.tokenizer is None:
        raise UserError(f"{dense.source} has no tokenizer; put its tokenizer files into the folder")
    return dense.tokenizer


def _sample(dense: LoadedModel, source: Text, seqlen: int) -> SampledWindows:
    """All windows of the text, at least two. Raises UserError."""
    sample = sample_windows(source, _tokenizer(dense), seqlen, dense.max_positions, dense.vocabulary)
    if len(sample.tokens) < 2:
        raise UserError(
            f"{source.description} has only one window of {seqlen} tokens; two are needed (one is held out): give a "
            "longer --text or a smaller --seqlen"
        )
    return sample


def compute_dtype(model_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """bfloat16 if the model uses it and the machine computes fast in it, else float32; fp16 gradients would
    overflow.
    """
    fast = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if model_dtype == torch.bfloat16 and fast else torch.float32
