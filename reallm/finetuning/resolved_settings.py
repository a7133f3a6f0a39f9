"""The settings of one run with the defaults that depend on the artifact filled in, and values derived from them."""

from __future__ import annotations

from dataclasses import dataclass, fields

from reallm.kernels.formats.terms import LowRank
from reallm.planner.tables.plan import Plan

from .settings import FinetuneSettings

DEFAULT_STEPS, MORE_STEPS = 60, 160
MORE_STEPS_FROM = 0.3
"""If the predicted loss in nats per token is at least this, the default number of steps is MORE_STEPS."""
ADAPTER_RANK = 8
GAIN_RATE, MAX_GAIN_RATE = 1 / 120, 5e-3
"""Peak learning rate of scales and norms: its value per nat of divergence, and its maximum."""
CODEBOOK_RATE = 0.04
"""Learning rate of a codebook per unit of its root mean square, as a multiple of that of scales and norms."""


@dataclass(frozen=True)
class ResolvedSettings(FinetuneSettings):
    """FinetuneSettings in which rank and steps are numbers."""

    rank: int = 0
    """Rank of new factors; 0 adds none."""
    steps: int = DEFAULT_STEPS
    """Optimiser steps of the end-to-end stage."""

    @property
    def learning_rates(self) -> dict[str, float]:
        """The peak learning rate of each group of `TrainableParts.parameter_groups`."""
        gains = MAX_GAIN_RATE if self.gain_learning_rate is None else self.gain_learning_rate
        books = gains * CODEBOOK_RATE
        return {"factors": self.learning_rate, "gains": gains, "codebooks": books, "maps": self.learning_rate / 10}

    def gain_rate(self, divergence: float) -> float:
        """The peak learning rate of scales and norms, proportional to `divergence` from the teacher (nats per token).

        Encoding shrinks the weights by a share of the distortion, and the divergence is proportional to the distortion.
        At three bits a model therefore needs a quarter of the step size that it needs at two.
        """
        if self.gain_learning_rate is not None or self.loss == "text":
            return self.learning_rates["gains"]
        return min(MAX_GAIN_RATE, max(GAIN_RATE * divergence, MAX_GAIN_RATE / 100))

    @property
    def loss_name(self) -> str:
        """What the loss is called in messages and notes."""
        return "KL to the original" if self.loss == "kl" else "loss"

    @property
    def new_factors(self) -> LowRank | None:
        """The low-rank term that a matrix without one gets; None adds none."""
        adds_factors = self.rank and self.init != "plan" and "factors" in self.train
        return LowRank(self.rank, self.factor_dtype) if adds_factors else None


def resolve(settings: FinetuneSettings, plan: Plan) -> ResolvedSettings:
    """`settings` with the defaults for the artifact of `plan` filled in. With `adapter`, only fp16 factors are
    trained.
    """
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    if settings.adapter:
        values |= {"train": ("factors",), "factor_dtype": "f16"}
    if settings.rank is None:
        values["rank"] = ADAPTER_RANK if settings.adapter else 0
    if settings.steps is None:
        values["steps"] = default_steps(plan)
    return ResolvedSettings(**values)


def default_steps(plan: Plan) -> int:
    """The default number of end-to-end steps: MORE_STEPS for a plan with a large predicted loss.

    A plan whose cost is the relative error does not predict a loss in nats and gets DEFAULT_STEPS.
    """
    return MORE_STEPS if plan.cost != "relative" and plan.predicted_loss >= MORE_STEPS_FROM else DEFAULT_STEPS
