"""Plan for many budgets: the Pareto curve of predicted loss against size, with a proof for each point."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction

from reallm.planner.problem.plan_options import PlanOptions
from reallm.planner.problem.selection import select
from reallm.planner.solvers.solve import optimise
from reallm.planner.tables.budget import Budget, parse_budget
from reallm.planner.tables.measured_table import MeasuredTable
from reallm.planner.tables.units import PlanError

from .allocate import infeasible
from .uniform import uniform_choices


@dataclass(frozen=True, slots=True)
class Point:
    """Size and loss of the best plan for one budget."""

    budget: str
    budget_bytes: int
    counted_bytes: int
    """Exact bytes of what the budget counts: the matrices or the whole weights file."""
    bits_per_weight: float
    predicted_loss: float
    """Predicted loss of the plan, nats per token."""
    best_bound: float
    """Proven lower bound of the loss for this budget, nats per token."""
    status: str
    """Either "optimal", when the plan is proved to be the best, or "feasible"."""
    shadow_price: float
    """Loss that one more MiB would save, nats per token per MiB."""
    uniform: str
    """The best single format within the budget; empty when none fits."""
    uniform_loss: float | None


def spaced_budgets(first: str, last: str, points: int) -> list[Budget]:
    """`points` evenly spaced budgets between `first` and `last`, in rising order; either end may be the larger.

    Raises PlanError for ends with different units, and for fewer than 2 points.
    """
    low, high = sorted((parse_budget(first), parse_budget(last)), key=lambda budget: budget.amount)
    if low.unit.lower() != high.unit.lower():
        raise PlanError(f"a sweep from {first} to {last}: both ends need the same unit, such as bpw or MiB")
    if points < 2:
        raise PlanError(f"a sweep has at least 2 budgets, not {points}")
    budgets = []
    for step in range(points):
        amount = low.amount + (high.amount - low.amount) * Fraction(step, points - 1)
        budgets.append(Budget(f"{float(amount):.6g}{low.unit}", amount, low.unit))
    return budgets


def sweep(table: MeasuredTable, budgets: Sequence[Budget], options: PlanOptions) -> list[Point]:
    """The best plan for each budget, in rising order; budgets that are too small for any plan are left out.

    `options.time_limit_s` applies to each budget. Raises PlanError when every budget is too small.
    """
    ranked = sorted(budgets, key=lambda budget: budget.amount)
    selection = select(table, ranked[0].scope, options)
    unlimited, points = selection.problem(None), []
    single_formats = uniform_choices(selection, unlimited)
    for budget in ranked:
        nbytes = budget.nbytes(selection.numel)
        problem = replace(unlimited, capacity=selection.capacity(nbytes))
        solution = optimise(problem, options.time_limit_s)
        if solution is None:
            continue
        bound, chosen = solution.bound(problem), problem.by_item(solution.chosen)
        matrices_bytes, _ = selection.sizes(chosen)
        single = min((choice[:3] for choice in single_formats if problem.fits(choice[3])), default=None)
        points.append(
            Point(
                budget=budget.text,
                budget_bytes=nbytes,
                counted_bytes=selection.counted(chosen),
                bits_per_weight=8 * matrices_bytes / selection.numel,
                predicted_loss=bound.objective,
                best_bound=bound.best_bound,
                status=bound.status,
                shadow_price=bound.shadow_price,
                uniform="" if single is None else single[2],
                uniform_loss=None if single is None else single[0],
            )
        )
    if not points:
        raise infeasible(ranked[-1], selection, unlimited)
    return points


def as_csv(points: Sequence[Point]) -> str:
    """The points as CSV: a header, then one line per point."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(asdict(points[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(point) for point in points)
    return stream.getvalue()
