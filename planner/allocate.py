"""The planner: from a measured table and a budget to a plan with its proof.

The same table, budget and wishes give the same plan to the byte, unless the time limit cuts the search short.
"""

from __future__ import annotations

from collections.abc import Sequence

from .assembly import assemble
from .budget import Budget, parse_budget
from .candidates import Wishes
from .lagrangian import runners_up
from .optimise import optimise, optimise_all, smallest_bytes
from .plan import Cost, Plan, PlanError, Ties
from .problem import Problem
from .records import MeasuredTable
from .selection import Selection, select
from .uniform import best_uniform


def solve(
    table: MeasuredTable,
    budget: Budget | str,
    *,
    pins: Sequence[str] = (),
    exclude: Sequence[str] = (),
    formats: Sequence[str] | None = None,
    ties: Ties = "none",
    cost: Cost = "two_sided",
    time_limit_s: float = 60.0,
    work: str = "",
) -> Plan:
    """The plan of least predicted loss within `budget` ("3.0bpw", "48MiB", ...).

    `pins` ("regex=format") and `exclude` (regexes) are searched for in matrix names; `formats` restricts the candidates
    to names and patterns. Raises PlanError for a budget or wish that cannot be met, with the smallest feasible budget.
    """
    wishes = Wishes(tuple(pins), tuple(exclude), None if formats is None else tuple(formats), ties, cost)
    return best_plans(table, budget, wishes, 1, time_limit_s, work)[0]


def best_plans(
    table: MeasuredTable,
    budget: Budget | str,
    wishes: Wishes,
    count: int,
    time_limit_s: float = 60.0,
    work: str = "",
) -> list[Plan]:
    """The `count` plans of least predicted loss, the best first; fewer where there are not so many.

    Raises PlanError as `solve` does, and for more than one plan where candidates share codebooks.
    """
    budget = parse_budget(budget) if isinstance(budget, str) else budget
    selection = select(table, budget.scope, wishes)
    budget_bytes = budget.nbytes(selection.numel)
    problem = selection.problem(budget_bytes)
    if count > 1 and problem.shared:
        raise PlanError(f"the {count} best plans are known only without shared codebooks; leave those formats out")
    solutions = optimise_all(problem, count) if count > 1 else [optimise(problem, time_limit_s)]
    uniform, plans = best_uniform(selection, problem), []
    for solution in solutions:
        if solution is None:
            raise too_small(budget, selection, problem, time_limit_s)
        runners = runners_up(problem, solution.chosen, solution.price)
        plans.append(
            assemble(
                selection,
                chosen=problem.by_name(solution.chosen),
                runners_up={item.name: runner for item, runner in zip(problem.items, runners, strict=True)},
                bound=solution.bound(problem),
                budget=(budget.text, budget_bytes),
                uniform=uniform,
                work=work,
            )
        )
    return plans


def too_small(budget: Budget, selection: Selection, problem: Problem, time_limit_s: float) -> PlanError:
    """What to tell of a budget that no choice fits, with the smallest that one does."""
    least = selection.smallest_budget(smallest_bytes(problem, time_limit_s))
    return PlanError(
        f"--budget {budget.text} is {budget.nbytes(selection.numel)} bytes, the smallest plan takes {least}: "
        f"ask for {budget.smallest(least, selection.numel)} or more, or measure smaller formats"
    )
