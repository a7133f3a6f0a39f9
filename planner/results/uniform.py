"""One format everywhere: what a plan is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum

from reallm.planner.problem.candidates import PlanOptions
from reallm.planner.problem.problem import Candidate, Problem
from reallm.planner.problem.selection import Selection, select
from reallm.planner.solvers.lagrangian import relax, shadow_price
from reallm.planner.solvers.solve import Solution
from reallm.planner.tables.measured_table import MeasuredTable
from reallm.planner.tables.plan import Cost, Plan, Scope, Uniform
from reallm.planner.tables.units import PlanError

from .assembly import assemble


@dataclass(frozen=True, slots=True)
class UniformPoint:
    """One format everywhere: its size and its predicted loss, whatever the budget."""

    format: str
    counted_bytes: int
    """Bytes of what a budget of its scope counts, exact."""
    bits_per_weight: float
    predicted_loss: float
    """Nats per token."""


def uniform_points(table: MeasuredTable, scope: Scope, plan_options: PlanOptions) -> list[UniformPoint]:
    """Every format that all matrices can have, the smallest first. Raises PlanError."""
    selection = select(table, scope, plan_options)
    problem, points = selection.problem(None), []
    for cost, _, name, chosen in uniform_choices(selection, problem):
        matrices_bytes, whole_file = selection.sizes(problem.by_name(chosen))
        counted = whole_file if scope == "file" else matrices_bytes
        points.append(UniformPoint(name, counted, 8 * matrices_bytes / selection.numel, cost))
    return sorted(points, key=lambda point: (point.counted_bytes, point.predicted_loss, point.format))


def best_uniform(selection: Selection, problem: Problem) -> Uniform | None:
    """The cheapest choice with one format everywhere that fits; None when none does."""
    fitting = [choice for choice in uniform_choices(selection, problem) if problem.fits(choice[3])]
    if not fitting:
        return None
    cost, _, name, chosen = min(fitting)
    return Uniform(format=name, nbytes=selection.counted(problem.by_name(chosen)), cost=cost)


def uniform_choices(selection: Selection, problem: Problem) -> list[tuple[float, int, str, list[Candidate]]]:
    """(cost, bytes, format, choice) of every format that all can have, whatever the capacity."""
    choices = []
    for name in sorted({c.format for item in problem.items for c in item.candidates}):
        chosen = one_format(problem, name, selection.optional)
        if chosen is not None:
            choices.append((problem.cost(chosen), problem.nbytes(chosen), name, chosen))
    return choices


def one_format(problem: Problem, name: str, optional: frozenset[str]) -> list[Candidate] | None:
    """Every item in format `name`; items with one candidate keep it, `optional` ones without it take cost 0.

    None when another item lacks it.
    """
    chosen = []
    for item in problem.items:
        same = [c for c in item.candidates if c.format == name]
        if not same and (len(item.candidates) == 1 or item.name in optional):
            same = [min(item.candidates, key=lambda c: (c.cost, c.nbytes))]
        if not same:
            return None
        chosen.append(same[0])
    return chosen if any(c.format == name for c in chosen) else None


def uniform_plan(
    table: MeasuredTable,
    fmt: str,
    *,
    scope: Scope = "matrices",
    pins: Sequence[str] = (),
    exclude: Sequence[str] = (),
    formats: Sequence[str] | None = None,
    cost: Cost = "two_sided",
    work: str = "",
) -> Plan:
    """The plan with `fmt` for every matrix that takes part; its budget is what it takes.

    Embedding and head stay dense where they were not measured in `fmt`. Raises PlanError when another matrix was not.
    """
    selection = select(
        table,
        scope,
        PlanOptions(tuple(pins), tuple(exclude), None if formats is None else tuple(formats), "none", cost),
    )
    unlimited = selection.problem(None)
    name = selection.canonical(fmt)
    chosen = one_format(unlimited, name, selection.optional)
    if chosen is None:
        lacking = next(i for i in unlimited.items if all(c.format != name for c in i.candidates))
        known = ", ".join(sorted(c.format for c in lacking.candidates))
        raise PlanError(f"format {name}: {lacking.name} was not measured in it; there are {known}")
    problem = Problem(unlimited.items, unlimited.shared, unlimited.nbytes(chosen))
    relaxation = relax(problem)
    price = shadow_price(relaxation)
    lower = min(max(relaxation.exact_bound(price), 0.0), fsum(c.cost for c in chosen))
    solution = Solution(chosen, lower, lower, price, finished=False)
    counted = selection.counted(problem.by_name(chosen))
    return assemble(
        selection,
        chosen=problem.by_name(chosen),
        runners_up={item.name: None for item in problem.items},
        bound=solution.bound(problem).model_copy(update={"solver": "none", "solver_version": ""}),
        budget=(f"uniform {name}", counted),
        uniform=Uniform(format=name, nbytes=counted, cost=problem.cost(chosen)),
        work=work,
    )
