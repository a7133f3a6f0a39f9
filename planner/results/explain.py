"""Why a plan is what it is: two plans beside each other, a matrix's candidates at the plan's price, the next bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from reallm.kernels.storage.layout import natural_key
from reallm.planner.problem.candidates import PlanOptions, measured_options
from reallm.planner.tables.budget import budget_of
from reallm.planner.tables.measured_table import MeasuredTable
from reallm.planner.tables.plan import Plan
from reallm.planner.tables.units import MIB, PlanError

from .allocate import best_plans
from .sweep import Point, sweep

LEFT_OUT = "as it is"


@dataclass(frozen=True, slots=True)
class Change:
    """One matrix that two plans store differently."""

    matrix: str
    before: str
    after: str
    nbytes: int
    """Bytes more."""
    cost: float
    """Predicted loss more, nats per token."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """One candidate of a matrix beside the one the plan chose."""

    matrix: str
    format: str
    nbytes: int
    cost: float
    regret: float
    """What choosing it instead would lose at the plan's shadow price, nats per token: 0 for the chosen one."""
    chosen: bool


def differences(before: Plan, after: Plan) -> list[Change]:
    """Matrices that the plans store differently, the largest change of loss first. Raises PlanError for two models."""
    if before.model_sha256 != after.model_sha256:
        raise PlanError(f"the plans are of different models: {before.model} and {after.model}")
    sides = [{c.matrix: (c.format, c.nbytes, c.cost) for c in plan.choices} for plan in (before, after)]
    changes = []
    for name in sorted(set(sides[0]) | set(sides[1]), key=natural_key):
        old, new = (side.get(name, (LEFT_OUT, 0, 0.0)) for side in sides)
        if old[0] != new[0]:
            changes.append(Change(name, old[0], new[0], new[1] - old[1], new[2] - old[2]))
    return sorted(changes, key=lambda change: -abs(change.cost))


def alternatives(table: MeasuredTable, plan: Plan, matrix: str) -> list[Alternative]:
    """All measured candidates of the matrices that the regex `matrix` finds, by size. Raises PlanError."""
    require_table(table, plan)
    try:
        wanted = [choice for choice in plan.choices if re.search(matrix, choice.matrix)]
    except re.error as error:
        raise PlanError(f"{matrix!r} is no regular expression: {error}") from None
    if not wanted:
        raise PlanError(f"{matrix!r} finds no matrix of the plan; the first is {plan.choices[0].matrix}")
    options = measured_options(table, plan.cost, plan.corrections)
    price, found = plan.bound.shadow_price / MIB, []
    sizes = {m.name: (m.rows, m.cols) for m in table.matrices}
    for choice in wanted:
        for name, option in options[choice.matrix].items():
            nbytes = choice.nbytes if name == choice.format else option.format.nbytes(*sizes[choice.matrix])
            regret = option.cost - choice.cost + price * (nbytes - choice.nbytes)
            chosen = name == choice.format
            found.append(Alternative(choice.matrix, name, nbytes, option.cost, 0.0 if chosen else regret, chosen))
    return sorted(found, key=lambda a: (natural_key(a.matrix), a.nbytes, a.format))


def next_bytes(table: MeasuredTable, plan: Plan, more: int = MIB) -> Plan:
    """The best plan with `more` bytes on top of the budget of `plan`, all else as it was asked. Raises PlanError."""
    require_table(table, plan)
    return best_plans(table, budget_of(plan, more), PlanOptions.of(plan), 1, work=plan.work)[0]


def curve(table: MeasuredTable, plan: Plan, points: int = 17) -> list[Point]:
    """The best plans from half to twice the bytes of `plan`, it among them, all else as asked. Raises PlanError."""
    require_table(table, plan)
    low, high = plan.counted_bytes // 2, 2 * plan.counted_bytes
    sizes = {low + (high - low) * step // (points - 1) for step in range(points)} | {plan.budget_bytes}
    budgets = [budget_of(plan, nbytes - plan.budget_bytes) for nbytes in sorted(sizes)]
    return sweep(table, budgets, PlanOptions.of(plan))


def require_table(table: MeasuredTable, plan: Plan) -> None:
    """Raise PlanError unless `plan` was made from `table`."""
    if table.digest() != plan.table_sha256:
        raise PlanError(f"the plan was made from another table than the one in {plan.work} now; plan again")
