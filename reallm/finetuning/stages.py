"""The stages of fine-tuning: which there are, in which order, and how many steps are worth it where nobody says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

from reallm.errors import UserError
from reallm.planner.tables.plan import Plan

if TYPE_CHECKING:
    from .pair import Training

Stage = Literal["codes", "blocks", "end-to-end"]
STEPS, MORE_STEPS = 60, 160
MORE_STEPS_FROM = 0.3
"""Nats of predicted loss from which more steps are worth their time (docs/log.md)."""


def check_order(stages: Sequence[str]) -> tuple[Stage, ...]:
    """`stages`, each known and there once. Raises UserError."""
    found = tuple(stage for name in stages for stage in get_args(Stage) if stage == name)
    named = ",".join(stages)
    if not found or len(found) < len(stages) or len(set(found)) < len(found):
        raise UserError(f"--order {named}: expected one or more of {', '.join(get_args(Stage))}, each once")
    if "codes" in found[1:]:
        raise UserError(f"--order {named}: new codes undo what was trained before; codes come first")
    return found


def worthwhile_steps(plan: Plan) -> int:
    """Steps from end to end that are worth their time for what the plan is predicted to lose.

    A plan by plain relative errors predicts no nats: it gets the fewer.
    """
    return MORE_STEPS if plan.cost != "relative" and plan.predicted_loss >= MORE_STEPS_FROM else STEPS


def in_words(training: Training, order: Sequence[Stage], steps: int) -> str:
    """The stages `order` of a run that made `steps` from end to end, the first one first."""
    words: dict[Stage, str] = {
        "end-to-end": f"for {steps} steps of {training.batch_size} x {training.seqlen} tokens",
        "codes": f"by new codes, {training.code_steps} steps after each block",
        "blocks": f"block by block for {training.block_epochs} x {training.block_windows} windows each",
    }
    return ", then ".join(words[stage] for stage in order)
