"""Many budgets at once: the Pareto curve of predicted loss over size, each point proved like a plan."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction

from reallm.planner.problem.candidates import PlanOptions
from reallm.planner.problem.selection import select
from reallm.planner.solvers.solve import optimise
from reallm.planner.tables.budget import Budget, parse_budget
from reallm.planner.tables.measured_table import MeasuredTable
from reallm.planner.tables.plan import Bound
from reallm.planner.tables.units import PlanError

from .allocate import too_small
from .uniform import uniform_choices


@dataclass(frozen=True, slots=True)
class Point:
    """The best plan of one budget, without its choices."""

    budget: str
    budget_bytes: int
    counted_bytes: int
    """Bytes of what the budget counts, exact."""
    bits_per_weight: float
    predicted_loss: float
    """Nats per token."""
    best_bound: float
    status: str
    shadow_price: float
    """Loss saved per further MiB, nats per token per MiB."""
    uniform: str
    """The best single format within the budget, or nothing."""
    uniform_loss: float | None


def spaced(first: str, last: str, points: int) -> list[Budget]:
    """`points` budgets from `first` to `last` (either may be the larger), evenly spaced, rising. Raises PlanError."""
    ends = sorted((parse_budget(first), parse_budget(last)), key=lambda budget: budget.amount)
    if len({budget.unit.lower() for budget in ends}) != 1:
        raise PlanError(f"a sweep from {first} to {last}: both ends need the same unit, such as bpw or MiB")
    if points < 2:
        raise PlanError(f"a sweep has 2 budgets or more, not {points}")
    low, high = ends
    result = []
    for step in range(points):
        amount = low.amount + (high.amount - low.amount) * Fraction(step, points - 1)
        result.append(Budget(f"{float(amount):.6g}{low.unit}", amount, low.unit))
    return result


def sweep(
    table: MeasuredTable, budgets: Sequence[Budget], plan_options: PlanOptions, time_limit_s: float = 60.0
) -> list[Point]:
    """The best plan of every budget that some choice fits, rising. Raises PlanError when none does."""
    ranked = sorted(budgets, key=lambda budget: budget.amount)
    selection = select(table, ranked[0].scope, plan_options)
    unlimited, points = selection.problem(None), []
    singles = uniform_choices(selection, unlimited)
    for budget in ranked:
        nbytes = budget.nbytes(selection.numel)
        problem = replace(unlimited, capacity=selection.capacity(nbytes))
        solution = optimise(problem, time_limit_s)
        if solution is None:
            continue
        bound: Bound = solution.bound(problem)
        chosen = problem.by_name(solution.chosen)
        matrices_bytes, _ = selection.sizes(chosen)
        single = min((choice[:3] for choice in singles if problem.fits(choice[3])), default=None)
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
        raise too_small(ranked[-1], selection, unlimited, time_limit_s)
    return points


def as_csv(points: Sequence[Point]) -> str:
    """A line a point, under a line of names."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(asdict(points[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(point) for point in points)
    return stream.getvalue()
