"""Explain a plan: what other formats would cost, and what a larger budget would gain."""

from __future__ import annotations

import re
from dataclasses import dataclass

from reallm.kernels.storage.layout import natural_key
from reallm.planner.problem.candidates import measured_options
from reallm.planner.problem.plan_options import PlanOptions
from reallm.planner.tables.budget import budget_of
from reallm.planner.tables.measured_table import MeasuredTable
from reallm.planner.tables.plan import Plan
from reallm.planner.tables.units import MIB, PlanError

from .allocate import best_plans
from .sweep import Point, sweep


@dataclass(frozen=True, slots=True)
class Alternative:
    """One format that a matrix of a plan could have."""

    matrix: str
    format: str
    nbytes: int
    cost: float
    """Predicted loss, nats per token."""
    regret: float
    """Regret at the plan's shadow price (see the glossary), nats per token; 0 for the chosen format."""
    chosen: bool


def alternatives(table: MeasuredTable, plan: Plan, matrix: str) -> list[Alternative]:
    """All measured formats of the matrices that the regex `matrix` matches, by matrix and size.

    Raises PlanError for a regex that is invalid or matches no matrix with a format, and if the plan was not made from
    `table`.
    """
    require_table(table, plan)
    without = without_format(plan, matrix)
    matching = [choice for choice in plan.choices if re.search(matrix, choice.matrix)]
    if not matching and without:
        reason, names = next(iter(without.items()))
        raise PlanError(f"{matrix!r} matches no matrix with a format in this plan; {names[0]} has none: {reason}")
    if not matching:
        raise PlanError(f"{matrix!r} matches no matrix of the plan, such as {plan.choices[0].matrix}")
    options = measured_options(table, plan.cost, plan.corrections)
    price, result = plan.bound.shadow_price / MIB, []
    shapes = {m.name: (m.rows, m.cols) for m in table.matrices}
    for choice in matching:
        for name, option in options[choice.matrix].items():
            chosen = name == choice.format
            nbytes = choice.nbytes if chosen else option.format.nbytes(*shapes[choice.matrix])
            regret = 0.0 if chosen else option.cost - choice.cost + price * (nbytes - choice.nbytes)
            result.append(Alternative(choice.matrix, name, nbytes, option.cost, regret, chosen))
    return sorted(result, key=lambda a: (natural_key(a.matrix), a.nbytes, a.format))


def without_format(plan: Plan, matrix: str) -> dict[str, list[str]]:
    """Reason -> the matrices that the regex `matrix` matches and that the plan leaves as they are.

    Raises PlanError for an invalid regex.
    """
    reasons = {name: reason for reason, names in plan.kept.items() for name in names}
    try:
        names = list(filter(re.compile(matrix).search, plan.dense))
    except re.error as error:
        raise PlanError(f"{matrix!r} is not a regular expression: {error}") from None
    matching: dict[str, list[str]] = {}
    for name in names:
        reason = reasons.get(name, "the budget does not count it, or --exclude names it")
        matching.setdefault(reason, []).append(name)
    return matching


def larger_plan(table: MeasuredTable, plan: Plan, extra_bytes: int = MIB) -> Plan:
    """The best plan with `extra_bytes` more than the budget of `plan` and the same options. Raises PlanError."""
    require_table(table, plan)
    return best_plans(table, budget_of(plan, extra_bytes), PlanOptions.of(plan), 1, work=plan.work)[0]


def sweep_around(table: MeasuredTable, plan: Plan, points: int = 17) -> list[Point]:
    """The best plans for budgets from half to twice the size of `plan`, one of them its own, with the same options.

    Raises PlanError.
    """
    require_table(table, plan)
    low, high = plan.counted_bytes // 2, 2 * plan.counted_bytes
    sizes = {low + (high - low) * step // (points - 1) for step in range(points)} | {plan.budget_bytes}
    budgets = [budget_of(plan, nbytes - plan.budget_bytes) for nbytes in sorted(sizes)]
    return sweep(table, budgets, PlanOptions.of(plan))


def require_table(table: MeasuredTable, plan: Plan) -> None:
    """Raise PlanError unless `plan` was made from `table`."""
    if table.digest() != plan.table_sha256:
        raise PlanError(
            f"the plan was made from another measured table than this one of {table.model}; name the work folder with "
            "its own table by --work, or plan again"
        )
