"""What is trained on what: the settings of a run, the packed model, the model it was made from, and the windows.

The last windows of the text are held out. Both models compute in the original's own bfloat16 where the machine is fast
in it, else in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..comparison import compare_models, mask_window
from ..errors import UserError
from ..kernels.terms import MAX_RANK, LowRank
from ..loading import load
from ..model import LoadedModel, load_model
from ..planner.plan import Plan
from ..text import Text, windows
from .factors import Modules, trainable_modules
from .trained import Part, check_parts

HELD_OUT_WINDOWS = 8
HELD_OUT_SHARE = 8  # at most one window in so many is held out, but always one


@dataclass(frozen=True)
class Training:
    """The settings of one run, all of which decide its result."""

    train: tuple[Part, ...] = ("factors", "scales", "norms")
    rank: int = 8
    factor_dtype: Literal["f16", "i8", "i4"] = "i8"
    steps: int = 200
    batch_size: int = 1
    seqlen: int = 512
    learning_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "train", check_parts(self.train))
        if not 0 <= self.rank <= MAX_RANK:
            raise UserError(f"--rank {self.rank}: expected 0 to {MAX_RANK}")
        if self.factor_dtype not in ("f16", "i8", "i4"):
            raise UserError(f"--factor-dtype {self.factor_dtype}: expected f16, i8 or i4")
        if self.steps < 1 or self.batch_size < 1:
            raise UserError(f"--steps {self.steps} --batch-size {self.batch_size}: expected at least 1 of each")
        if not 0 < self.learning_rate < 1:
            raise UserError(f"--learning-rate {self.learning_rate}: expected a number between 0 and 1, such as 1e-3")
        if self.seqlen < 8:
            raise UserError(f"--seqlen {self.seqlen}: expected at least 8 tokens")

    @property
    def term(self) -> LowRank | None:
        """The low-rank term of a matrix that has none yet; None for none."""
        return LowRank(self.rank, self.factor_dtype) if self.rank and "factors" in self.train else None


@dataclass(frozen=True)
class Pair:
    """The packed model, the one it was made from, and the windows they are compared on."""

    original: LoadedModel
    model: PreTrainedModel
    modules: Modules
    train: Tensor
    """Token ids [windows, seqlen]."""
    held_out: Tensor
    """Token ids [windows, seqlen]; no window of `train` is among them."""
    mask_token: int | None
    """An encoder's."""

    def divergence(self, seed: int) -> float:
        """Mean KL(original || model) on the held-out windows, nats per token."""
        found = compare_models(
            self.original.model, self.model, self.held_out, mask_token=self.mask_token, seed=seed, progress=False
        )
        assert found.divergence is not None  # there is a base
        return found.divergence.mean

    def inputs(self, tokens: Tensor, seed: int) -> Tensor:
        """Windows as the models are shown them: an encoder's have some tokens masked."""
        if self.mask_token is None:
            return tokens
        return torch.cat([mask_window(window, self.mask_token, seed + i).inputs for i, window in enumerate(tokens)])


def open_pair(
    artifact: Path, plan: Plan, teacher: Path | str | None, source: Text, training: Training, device: str
) -> Pair:
    """Load both models and cut the text into windows; the last ones are held out. Raises UserError."""
    place = _device(device)
    original = load_model(teacher or plan.model)
    if original.digest != plan.model_sha256:
        raise UserError(f"{original.source} is not the model {artifact} was made from; give that one as --teacher")
    tokens = _windows(original, source, training)
    dtype = _compute_dtype(original.dtype, place)
    model, _ = load(artifact, device=place, dtype=dtype)
    original.model.to(device=place, dtype=dtype)
    modules = trainable_modules(model)
    if not modules:
        raise UserError(f"{artifact} has no compressed linear, so there is nothing to train")
    held_out = min(HELD_OUT_WINDOWS, max(1, len(tokens) // HELD_OUT_SHARE))
    return Pair(original, model, modules, tokens[:-held_out], tokens[-held_out:], _mask_token(original))


def _device(name: str) -> torch.device:
    """The Trainer takes the first GPU or none."""
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"--device {name}: expected cpu, or cuda where PyTorch finds a GPU")
    return torch.device(name)


def _tokenizer(original: LoadedModel) -> PreTrainedTokenizerBase:
    if original.tokenizer is None:
        raise UserError(f"{original.source} has no tokenizer; put its tokenizer files into the folder")
    return original.tokenizer


def _windows(original: LoadedModel, source: Text, training: Training) -> Tensor:
    """All windows of the text, int64 [windows, seqlen]; at least two. Raises UserError."""
    tokens = windows(source, _tokenizer(original), None, training.seqlen, max_positions=original.max_positions)
    if len(tokens) < 2:
        raise UserError(
            f"{source.description}: one window of {training.seqlen} tokens found, two needed (one is held out); "
            "give a longer --text or a smaller --seqlen"
        )
    return tokens


def _mask_token(original: LoadedModel) -> int | None:
    """The mask token of an encoder; None for a model that generates."""
    if not original.is_encoder:
        return None
    mask: int | None = _tokenizer(original).mask_token_id
    if mask is None:
        raise UserError(f"{original.source} neither generates nor has a mask token; expected a language model")
    return mask


def _compute_dtype(own: torch.dtype, device: torch.device) -> torch.dtype:
    """The model's own bfloat16 where the machine is fast in it, else float32; fp16 would overflow in the gradients."""
    fast = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if own == torch.bfloat16 and fast else torch.float32
