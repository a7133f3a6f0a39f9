"""The settings of fine-tuning: one dataclass for the function, the command line and the checkpoints.

The command line turns each field into an option and shows the field's docstring as its help. This module imports
neither torch nor transformers, so that `reallm finetune --help` answers at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from reallm.errors import UserError
from reallm.kernels.formats.terms import MAX_RANK

Part = Literal["factors", "scales", "norms", "codebooks", "embeddings"]
PARTS: tuple[Part, ...] = get_args(Part)
Stage = Literal["codes", "blocks", "end-to-end"]
STAGES: tuple[Stage, ...] = get_args(Stage)
FactorDtype = Literal["f16", "i8", "i4"]
FactorInit = Literal["zero", "loftq", "lq-lora", "plan"]
Loss = Literal["kl", "text"]

RUN_OPTIONS = frozenset(
    {"adapter", "teacher", "work", "device", "gradient_checkpointing", "resume", "kernels", "force"}
)
"""Fields that do not affect the result: an interrupted run may be resumed with other values of these."""


@dataclass(frozen=True)
class FinetuneSettings:
    """What to train, how long, and where. The defaults are good for a first run.

    A value that is out of range, or that contradicts another, raises UserError.

    >>> reallm.FinetuneSettings(train=("scales", "norms"), steps=100).steps
    100
    """

    train: Sequence[Part] = ("factors", "scales", "norms")
    """Comma-separated parts to train: factors (they add bytes), scales, norms, codebooks, embeddings (these add
    none).
    """
    rank: int | None = None
    """Rank of the new low-rank factors of matrices that have none, 0 to 1024; 0 adds none.
    Default: 0, or 8 with --adapter.
    """
    factor_dtype: FactorDtype = "i8"
    """How new factors are stored."""
    init: FactorInit = "lq-lora"
    """Initial value of new factors: zero, as in LoRA; loftq or lq-lora, an approximation of the encoding error; plan
    adds no factors.
    """
    stages: Sequence[Stage] = ("end-to-end",)
    """Comma-separated stages, in order. codes re-encodes the blocks in order and trains the later, not yet encoded
    weights to compensate; blocks trains one block at a time; end-to-end trains the whole model.
    """
    loss: Loss = "kl"
    """kl: the divergence from the dense model; text: the cross entropy of the text's next token."""
    adapter: bool = False
    """Write a LoRA adapter in PEFT's format instead of an artifact; only factors are trained, in fp16."""
    dora: bool = False
    """With --adapter: also train a magnitude for every row (DoRA)."""

    steps: int | None = None
    """Optimiser steps of the end-to-end stage. Default: 60, or 160 for a plan that is predicted to lose 0.3 nats per
    token or more.
    """
    batch_size: int = 1
    """Windows per optimiser step."""
    seqlen: int = 512
    """Tokens per window, at least 8."""
    learning_rate: float = 1e-3
    """Peak learning rate of factors; it decays along a cosine."""
    gain_learning_rate: float | None = None
    """Peak learning rate of scales and norms. Default: 1/120 of the KL divergence before training, at most 5e-3."""
    patience: int = 3
    """Stop after this many evaluations in a row without a lower held-out loss; 0 never stops early."""
    seed: int = 0
    """Seed of all random choices; the same seed gives the same result."""
    block_windows: int = 64
    """Number of windows that the stage blocks trains each block on."""
    block_epochs: int = 2
    """Number of passes over these windows for each block."""
    code_steps: int = 4
    """Optimiser steps that the stage codes makes after re-encoding each block."""
    code_learning_rate: float = 1e-4
    """Peak learning rate, in the stage codes, of the weights that are not yet encoded; that of norms is ten times as
    high.
    """

    teacher: Path | str | None = None
    """The dense model that the artifact was made from, if it has moved since it was measured."""
    work: Path | str | None = None
    """The work folder, which the stage codes reads, if it has moved since planning."""
    device: str = "cpu"
    """Where to train: cpu, cuda, or auto for a GPU if there is one."""
    gradient_checkpointing: bool = False
    """Use less memory but more time: recompute activations and decode the weights again in the backward pass."""
    resume: bool = True
    """Continue an interrupted run that had the same settings."""
    kernels: bool = True
    """Add the generated sources of the GPU kernels to the new artifact."""
    force: bool = False
    """Replace an existing artifact at the output path."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "train", _known_parts(self.train))
        object.__setattr__(self, "stages", _known_stages(self.stages))
        _check_choices(self)
        _check_ranges(self)
        _check_combinations(self)

    def deciding_values(self) -> dict[str, int | float | str | None]:
        """The fields that decide the result, as stored in checkpoints; `stages` is stored under its former name
        "order".
        """
        values: dict[str, Any] = {name: value for name, value in asdict(self).items() if name not in RUN_OPTIONS}
        order = ",".join(values.pop("stages"))
        return values | {"train": ",".join(self.train), "order": order}


def with_overrides(settings: FinetuneSettings | None, overrides: Mapping[str, Any]) -> FinetuneSettings:
    """`settings` (None: the defaults) with single fields replaced; `order` is the former name of `stages`.

    Raises TypeError for an unknown name and UserError for an unusable value.
    """
    values = dict(overrides)
    if "order" in values:
        values["stages"] = values.pop("order")
    known = [field.name for field in fields(FinetuneSettings)]
    if unknown := [name for name in values if name not in known]:
        raise TypeError(f"finetune() has no setting {unknown[0]!r}; expected one of {', '.join(known)}")
    return replace(settings or FinetuneSettings(), **values)


def _known_parts(parts: Sequence[str]) -> tuple[Part, ...]:
    """`parts` without repetitions, in the order of PARTS. Raises UserError for an unknown part, or if there is none."""
    if unknown := [part for part in parts if part not in PARTS]:
        raise UserError(f"--train {unknown[0]}: expected {', '.join(PARTS)}")
    if not parts:
        raise UserError(f"--train names nothing to train; expected one or more of {', '.join(PARTS)}")
    return tuple(part for part in PARTS if part in parts)


def _known_stages(stages: Sequence[str]) -> tuple[Stage, ...]:
    """`stages` in the given order. Raises UserError if they are unknown, repeated or in an impossible order."""
    known = tuple(stage for name in stages for stage in STAGES if stage == name)
    named = ",".join(stages)
    if not known or len(known) < len(stages) or len(set(known)) < len(known):
        raise UserError(f"--stages {named}: expected one or more of {', '.join(STAGES)}, each at most once")
    if "codes" in known[1:]:
        raise UserError(f"--stages {named}: new codes would undo the earlier training; put codes first")
    return known


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


_CHOICES: dict[str, tuple[str, ...]] = {
    "factor_dtype": get_args(FactorDtype),
    "init": get_args(FactorInit),
    "loss": get_args(Loss),
}
_RANGES: dict[str, tuple[float, float, str]] = {
    "rank": (0, MAX_RANK, f"0 to {MAX_RANK}"),
    "steps": (1, float("inf"), "at least 1 optimiser step"),
    "batch_size": (1, float("inf"), "at least 1 window"),
    "seqlen": (8, float("inf"), "at least 8 tokens"),
    "patience": (0, float("inf"), "at least 0 evaluations"),
    "block_windows": (1, float("inf"), "at least 1 window"),
    "block_epochs": (1, float("inf"), "at least 1 pass"),
    "code_steps": (0, float("inf"), "at least 0 optimiser steps"),
}
"""The smallest and the largest value of each integer field, and the range in words."""
_LEARNING_RATES = {"learning_rate": "1e-3", "gain_learning_rate": "1e-3", "code_learning_rate": "1e-4"}
"""Each learning rate field, with a usual value for the error message."""


def _check_choices(settings: FinetuneSettings) -> None:
    for name, choices in _CHOICES.items():
        if (value := getattr(settings, name)) not in choices:
            raise UserError(f"{_option(name)} {value}: expected {', '.join(choices[:-1])} or {choices[-1]}")


def _check_ranges(settings: FinetuneSettings) -> None:
    for name, (least, largest, expected) in _RANGES.items():
        value = getattr(settings, name)
        if value is not None and not least <= value <= largest:
            raise UserError(f"{_option(name)} {value}: expected {expected}")
    for name, usual in _LEARNING_RATES.items():
        rate = getattr(settings, name)
        if rate is not None and not 0 < rate < 1:
            raise UserError(f"{_option(name)} {rate}: expected a number between 0 and 1, such as {usual}")


def _check_combinations(settings: FinetuneSettings) -> None:
    if settings.dora and not settings.adapter:
        raise UserError("--dora: row magnitudes can be stored in adapters only; add --adapter")
    if settings.adapter and "codes" in settings.stages:
        raise UserError("--stages codes makes new codes, which an --adapter cannot hold; leave one of the two out")
    towards_dense = next((stage for stage in settings.stages if stage != "end-to-end"), None)
    if settings.loss == "text" and towards_dense is not None:
        raise UserError(f"--stages {towards_dense} trains the model to match the dense model: it needs --loss kl")
