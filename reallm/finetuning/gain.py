"""What fine-tuning gained, as numbers and as the sentences that the plan, the model card and the log contain."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from reallm.planner.tables.plan import Plan
from reallm.text.corpus import Text

from .resolved_settings import ResolvedSettings
from .settings import Stage

LOG = logging.getLogger(__name__)
MIN_GAIN = 1e-4
"""The loss must fall by at least this share to count as a gain; rounding in another summation order changes it less."""


@dataclass(frozen=True)
class Gain:
    """The loss on the held-out windows before and after training, in nats per token, and the steps and stages run."""

    before: float
    """The loss of the artifact."""
    started: float
    """The loss with the initial values of all trained parts, including new factors, before any training."""
    trained: float
    """The loss with the trained values as they are stored; infinite if they cannot be stored."""
    steps: int
    """End-to-end steps that were made."""
    gain_rate: float
    """The peak learning rate of scales and norms."""
    stages: tuple[Stage, ...]
    """The stages that were run, without "codes" if the new codes were discarded."""

    @property
    def after(self) -> float:
        """The loss of the better of the initial and the trained state, which is the one that is kept."""
        return min(self.started, self.trained)

    @property
    def is_real(self) -> bool:
        """Whether the loss fell by more than MIN_GAIN times the loss before."""
        return self.after < self.before * (1 - MIN_GAIN)


def plan_notes(
    gain: Gain, settings: ResolvedSettings, source: Text, linear_count: int, held_out_count: int
) -> list[str]:
    """The notes on fine-tuning that the plan and the model card contain.

    `linear_count` is the number of compressed linears, `held_out_count` the number of held-out windows.
    """
    helped = gain.trained < gain.started
    stages = gain.stages if helped else tuple(stage for stage in gain.stages if stage == "codes")
    how = (
        f"trained {_in_words(settings, stages, gain.steps)} at learning rates "
        f"{settings.learning_rate:g} and {gain.gain_rate:.2g} on {source.description}"
        if stages
        else f"left as they started, new factors from {source.description}"
    )
    if not helped and gain.stages != stages:
        how += "; training did not lower the loss further"
    return [
        f"{', '.join(settings.train)} of {linear_count} matrices were {how}",
        f"{settings.loss_name} on {held_out_count} held-out windows of that text: {gain.before:.4f} nats per "
        f"token before, {gain.after:.4f} after",
        "costs, bound and predicted loss are those of the codes before that",
    ]


def _in_words(settings: ResolvedSettings, stages: Sequence[Stage], steps: int) -> str:
    """The stages of a run that made `steps` end-to-end steps, in words and in order."""
    words: dict[Stage, str] = {
        "end-to-end": f"for {steps} steps of {settings.batch_size} x {settings.seqlen} tokens",
        "codes": f"by new codes, {settings.code_steps} steps after each block",
        "blocks": f"block by block for {settings.block_epochs} x {settings.block_windows} windows each",
    }
    return ", then ".join(words[stage] for stage in stages)


def log_gain(old: Plan, new: Plan, gain: Gain, loss_name: str, seconds: float) -> None:
    """Log the loss and the size before and after."""
    LOG.info("held-out %s: %.4f -> %.4f nats per token; %.0f s", loss_name, gain.before, gain.after, seconds)
    sizes = (old.file_bytes, new.file_bytes, old.bits_per_weight, new.bits_per_weight)
    LOG.info("weights file: %d -> %d bytes, %.4f -> %.4f bits per weight", *sizes)
