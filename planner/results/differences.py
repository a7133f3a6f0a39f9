"""What two plans of one model store differently."""

from __future__ import annotations

from dataclasses import dataclass

from reallm.kernels.storage.layout import natural_key
from reallm.planner.tables.plan import Plan
from reallm.planner.tables.units import PlanError

NOT_IN_PLAN = "as it is"
"""Shown instead of a format for a matrix that one of two compared plans leaves uncompressed."""


@dataclass(frozen=True, slots=True)
class Change:
    """One matrix that two plans store differently."""

    matrix: str
    before: str
    """Its format in the first plan."""
    after: str
    """Its format in the second plan."""
    nbytes: int
    """Bytes in the second plan minus bytes in the first."""
    cost: float
    """Predicted loss in the second plan minus that in the first, nats per token."""


def differences(before: Plan, after: Plan) -> list[Change]:
    """The matrices that two plans store differently, the largest change of loss first.

    Raises PlanError for plans of different models.
    """
    if before.model_sha256 != after.model_sha256:
        raise PlanError(f"the plans are of different models: {before.model} and {after.model}")
    sides = [{c.matrix: (c.format, c.nbytes, c.cost) for c in plan.choices} for plan in (before, after)]
    changes = []
    for name in sorted(set(sides[0]) | set(sides[1]), key=natural_key):
        old, new = (side.get(name, (NOT_IN_PLAN, 0, 0.0)) for side in sides)
        if old[0] != new[0]:
            changes.append(Change(name, old[0], new[0], new[1] - old[1], new[2] - old[2]))
    return sorted(changes, key=lambda change: -abs(change.cost))
