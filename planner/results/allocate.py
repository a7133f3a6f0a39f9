"""The planner: from a measured table and a budget to a plan with its proof.

The same table, budget and options give the same plan, byte for byte, unless the time limit ends the search early.
"""

from __future__ import annotations

from typing import Unpack

from reallm.planner.problem.plan_options import PlanKeywords, PlanOptions, merged_options
from reallm.planner.problem.problem import Problem
from reallm.planner.problem.selection import Selection, select
from reallm.planner.solvers.lagrangian import runners_up
from reallm.planner.solvers.solve import Solution, cheapest_solutions, least_stretch, optimise, smallest_bytes
from reallm.planner.tables.budget import Budget, parse_budget
from reallm.planner.tables.measured_table import MeasuredTable
from reallm.planner.tables.plan import LimitState, Plan
from reallm.planner.tables.units import MIB, PlanError

from .assembly import assemble
from .uniform import best_uniform
from .unmeasured import DEVIATIONS, described, unmeasured, with_predictions

STATE_UNITS = {"bytes": MIB, "ns": 10**6}
"""Unit of a limit -> number of units that the shadow price in a `LimitState` refers to (one MiB, one millisecond)."""


def solve(
    table: MeasuredTable,
    budget: Budget | str,
    options: PlanOptions | None = None,
    *,
    work: str = "",
    **keywords: Unpack[PlanKeywords],
) -> Plan:
    """The plan with the least predicted loss within `budget` ("3.0bpw", "48MiB", ...).

    A keyword replaces the field of `options` with the same name. `work` is the folder of the table, which the
    plan records. Raises PlanError for a budget that is too small, naming the smallest one, and for options that cannot
    be met.
    """
    merged = merged_options(options, keywords)
    plan = best_plans(table, budget, merged, 1, work)[0]
    if not table.predictions:
        return plan
    hopeful = best_plans(with_predictions(table, DEVIATIONS), budget, merged, 1)[0]
    what = unmeasured(plan, hopeful, len(table.predictions))
    return plan.model_copy(update={"unmeasured": what, "notes": (*plan.notes, described(what))})


def best_plans(
    table: MeasuredTable, budget: Budget | str, options: PlanOptions, count: int, work: str = ""
) -> list[Plan]:
    """The `count` plans with the least predicted loss, the best first; fewer where fewer exist.

    Raises PlanError as `solve` does, and when more than one plan is asked for together with pools or a latency.
    """
    budget = budget if isinstance(budget, Budget) else parse_budget(str(budget))
    selection = select(table, budget.scope, options)
    budget_bytes = budget.nbytes(selection.numel)
    problem = selection.problem(budget_bytes)
    if count > 1 and problem.limits:
        raise PlanError(f"the {count} best plans can be found for one budget only; leave pools and latency out")
    time_limit_s = options.time_limit_s
    solutions = cheapest_solutions(problem, count, time_limit_s) if count > 1 else [optimise(problem, time_limit_s)]
    if not solutions:
        raise PlanError(f"no plan was found within {time_limit_s:g} s; give --time-limit more seconds")
    uniform, plans = best_uniform(selection, problem), []
    for solution in solutions:
        if solution is None:
            raise infeasible(budget, selection, problem)
        runners = runners_up(problem, solution.chosen, solution.price, solution.prices)
        plans.append(
            assemble(
                selection,
                chosen=problem.by_item(solution.chosen),
                runners_up={item.name: runner for item, runner in zip(problem.items, runners, strict=True)},
                bound=solution.bound(problem),
                budget=(budget.text, budget_bytes),
                uniform=uniform,
                work=work,
                limits=_limit_states(problem, solution),
            )
        )
    return plans


def _limit_states(problem: Problem, solution: Solution) -> list[LimitState]:
    return [
        LimitState(
            name=limit.name,
            unit=limit.unit,
            capacity=limit.capacity,
            used=problem.limit_use(solution.chosen, n),
            shadow_price=solution.prices[n] * STATE_UNITS[limit.unit],
        )
        for n, limit in enumerate(problem.limits)
    ]


def infeasible(budget: Budget, selection: Selection, problem: Problem) -> PlanError:
    """The error for a problem without any choice; it says what is too small and what would be enough.

    It names the budget alone, one limit alone, or those that cannot all be met together.
    """
    time_limit_s, budget_bytes = selection.plan_options.time_limit_s, budget.nbytes(selection.numel)
    smallest = selection.smallest_budget(smallest_bytes(problem, time_limit_s))
    if smallest > budget_bytes:
        reserved = f", {selection.reserved.nbytes} of them not for weights" if selection.reserved.nbytes else ""
        return PlanError(
            f"--budget {budget.text} is {budget_bytes} bytes, the smallest plan takes {smallest}{reserved}: "
            f"ask for {budget.smallest_text(smallest, selection.numel)} or more, or measure smaller formats"
        )
    for n, limit in enumerate(problem.limits):
        least_use = sum(min(c.uses[n] for c in item.candidates) for item in problem.items)
        if least_use > limit.capacity:
            left = f"leaves {max(limit.capacity, 0)} {limit.unit} for the matrices that take part"
            return PlanError(f"{limit.name} {left}; in any formats they take {least_use} or more: raise this limit")
    return _conflicting(problem, time_limit_s)


def _conflicting(problem: Problem, time_limit_s: float) -> PlanError:
    """The error for capacities of which each can be met alone, but not all together."""
    stretch = least_stretch(problem, time_limit_s)
    if stretch is None:
        return PlanError(
            f"no {problem.max_formats} formats cover every matrix: raise --max-formats, or drop pins that need others"
        )
    exceeded = []
    if stretch.nbytes > problem.capacity:
        exceeded.append(f"the budget ({stretch.nbytes} bytes of {problem.capacity})")
    for limit, used in zip(problem.limits, stretch.used, strict=True):
        if used > limit.capacity:
            exceeded.append(f"{limit.name} ({used} {limit.unit} of {limit.capacity})")
    or_formats = f", or allow more than {problem.max_formats} formats" if problem.max_formats is not None else ""
    return PlanError(
        f"no plan keeps the budget and all limits together; the nearest one exceeds {', '.join(exceeded)}: raise them "
        f"by {100 * stretch.share:.2g}%{or_formats}"
    )
