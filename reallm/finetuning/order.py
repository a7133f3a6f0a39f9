"""The stages of fine-tuning: which there are, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

from ..errors import UserError

if TYPE_CHECKING:
    from .pair import Training

Stage = Literal["codes", "blocks", "end-to-end"]


def check_order(stages: Sequence[str]) -> tuple[Stage, ...]:
    """`stages`, each known and there once. Raises UserError."""
    found = tuple(stage for name in stages for stage in get_args(Stage) if stage == name)
    named = ",".join(stages)
    if not found or len(found) < len(stages) or len(set(found)) < len(found):
        raise UserError(f"--order {named}: expected one or more of {', '.join(get_args(Stage))}, each once")
    if "codes" in found[1:]:
        raise UserError(f"--order {named}: new codes undo what was trained before; codes come first")
    return found


def in_words(training: Training, steps: int) -> str:
    """The stages of a run that made `steps` from end to end, the first one first."""
    words: dict[Stage, str] = {
        "end-to-end": f"for {steps} steps of {training.batch_size} x {training.seqlen} tokens",
        "codes": f"by new codes, {training.code_steps} steps after each block",
        "blocks": f"block by block for {training.block_epochs} x {training.block_windows} windows each",
    }
    return ", then ".join(words[stage] for stage in training.order)
