"""The planner: from a measured table and a budget to a plan with its proof.

The same table, budget and wishes give the same plan to the byte, unless the time limit cuts the search short.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from reallm.planner.problem.candidates import PlanOptions
from reallm.planner.problem.problem import Problem
from reallm.planner.problem.selection import Selection, select
from reallm.planner.solvers.lagrangian import runners_up
from reallm.planner.solvers.solve import Solution, least_stretch, optimise, optimise_all, smallest_bytes
from reallm.planner.tables.budget import Budget, parse_budget
from reallm.planner.tables.measured_table import MeasuredTable
from reallm.planner.tables.plan import Cost, LimitState, Plan, Ties
from reallm.planner.tables.requirements import Requirements
from reallm.planner.tables.units import MIB, PlanError

from .assembly import assemble
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
    requirements: Requirements | None = None,
    time_limit_s: float = 60.0,
    work: str = "",
) -> Plan:
    """The plan of least predicted loss within `budget` ("3.0bpw", "48MiB", ...).

    `pins` ("regex=format") and `exclude` (regexes) are searched for in matrix names; `formats` restricts the candidates
    to names and patterns; `requirements` are further limits, and what shares the budget's memory. Raises PlanError for
    a budget or wish that cannot be met, with the smallest feasible budget.
    """
    plan_options = PlanOptions(tuple(pins), tuple(exclude), None if formats is None else tuple(formats), ties, cost)
    plan_options = plan_options if requirements is None else replace(plan_options, requirements=requirements)
    return best_plans(table, budget, plan_options, 1, time_limit_s, work)[0]


def best_plans(
    table: MeasuredTable,
    budget: Budget | str,
    plan_options: PlanOptions,
    count: int,
    time_limit_s: float = 60.0,
    work: str = "",
) -> list[Plan]:
    """The `count` plans of least predicted loss, the best first; fewer where there are not so many.

    Raises PlanError as `solve` does, and for more than one plan with pools or latency.
    """
    budget = parse_budget(budget) if isinstance(budget, str) else budget
    selection = select(table, budget.scope, plan_options)
    budget_bytes = budget.nbytes(selection.numel)
    problem = selection.problem(budget_bytes)
    if count > 1 and problem.limits:
        raise PlanError(f"the {count} best plans are known only for one budget; leave pools and latency out")
    solutions = optimise_all(problem, count, time_limit_s) if count > 1 else [optimise(problem, time_limit_s)]
    if not solutions:
        raise PlanError(f"no plan was found within {time_limit_s:g} s; give --time-limit more seconds")
    uniform, plans = best_uniform(selection, problem), []
    for solution in solutions:
        if solution is None:
            raise too_small(budget, selection, problem, time_limit_s)
        runners = runners_up(problem, solution.chosen, solution.price, solution.prices)
        plans.append(
            assemble(
                selection,
                chosen=problem.by_name(solution.chosen),
                runners_up={item.name: runner for item, runner in zip(problem.items, runners, strict=True)},
                bound=solution.bound(problem),
                budget=(budget.text, budget_bytes),
                uniform=uniform,
                work=work,
                limits=_states(problem, solution),
            )
        )
    return plans


def _states(problem: Problem, solution: Solution) -> list[LimitState]:
    units = {"bytes": MIB, "ns": 10**6}
    return [
        LimitState(
            name=limit.name,
            unit=limit.unit,
            capacity=limit.capacity,
            used=problem.used(solution.chosen, n),
            shadow_price=solution.prices[n] * units[limit.unit],
        )
        for n, limit in enumerate(problem.limits)
    ]


def too_small(budget: Budget, selection: Selection, problem: Problem, time_limit_s: float) -> PlanError:
    """What to tell of a problem that has no choice: the budget alone, a limit alone, or which of them together."""
    budget_bytes = budget.nbytes(selection.numel)
    least = selection.smallest_budget(smallest_bytes(problem, time_limit_s))
    if least > budget_bytes:
        beside = f", {selection.reserved.nbytes} of them for what is not weights" if selection.reserved.nbytes else ""
        return PlanError(
            f"--budget {budget.text} is {budget_bytes} bytes, the smallest plan takes {least}{beside}: "
            f"ask for {budget.smallest(least, selection.numel)} or more, or measure smaller formats"
        )
    for n, limit in enumerate(problem.limits):
        alone = sum(min(c.uses[n] for c in item.candidates) for item in problem.items)
        if alone > limit.capacity:
            left = f"leaves {max(limit.capacity, 0)} {limit.unit} for the matrices that take part"
            return PlanError(f"{limit.name} {left}; whatever the formats, they take {alone} or more: raise it")
    stretch = least_stretch(problem, time_limit_s)
    if stretch is None:
        return PlanError(f"no {problem.max_formats} formats cover every matrix: raise --max-formats, or drop pins")
    binding = (
        [f"the budget ({stretch.nbytes} bytes for {problem.capacity})"] if stretch.nbytes > problem.capacity else []
    )
    for limit, used in zip(problem.limits, stretch.used, strict=True):
        if used > limit.capacity:
            binding.append(f"{limit.name} ({used} {limit.unit} for {limit.capacity})")
    return PlanError(
        f"no plan keeps all that was asked together; the nearest breaks {', '.join(binding)}: raise them by "
        f"{100 * stretch.share:.2g}%"
        + (f", or allow more than {problem.max_formats} formats" if problem.max_formats is not None else "")
    )
