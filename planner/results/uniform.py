"""Plans with a single format for all matrices: what a mixed plan is compared with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import fsum

from reallm.planner.problem.candidates import parsed_format
from reallm.planner.problem.plan_options import PlanOptions
from reallm.planner.problem.problem import Candidate, Problem
from reallm.planner.problem.selection import Selection, select
from reallm.planner.solvers.lagrangian import relax, shadow_price
from reallm.planner.solvers.solve import Solution
from reallm.planner.tables.measured_table import MeasuredTable
from reallm.planner.tables.plan import Plan, Scope, Uniform
from reallm.planner.tables.requirements import Requirements
from reallm.planner.tables.units import PlanError

from .assembly import assemble


@dataclass(frozen=True, slots=True)
class UniformPoint:
    """Size and predicted loss of a plan with one format for all matrices, whatever the budget."""

    format: str
    counted_bytes: int
    """Exact bytes of what the scope counts: the matrices or the whole weights file."""
    bits_per_weight: float
    predicted_loss: float
    """Predicted loss of the plan, nats per token."""


def uniform_points(table: MeasuredTable, scope: Scope, options: PlanOptions) -> list[UniformPoint]:
    """One point per format that all matrices can have, the smallest first. Raises PlanError."""
    selection = select(table, scope, options)
    problem, points = selection.problem(None), []
    for cost, _, name, chosen in uniform_choices(selection, problem):
        matrices_bytes, all_file_bytes = selection.sizes(problem.by_item(chosen))
        counted = all_file_bytes if scope == "file" else matrices_bytes
        points.append(UniformPoint(name, counted, 8 * matrices_bytes / selection.numel, cost))
    return sorted(points, key=lambda point: (point.counted_bytes, point.predicted_loss, point.format))


def best_uniform(selection: Selection, problem: Problem) -> Uniform | None:
    """The cheapest choice with a single format that fits the budget and limits of `problem`; None when none fits."""
    fitting = [choice for choice in uniform_choices(selection, problem) if problem.fits(choice[3])]
    if not fitting:
        return None
    cost, _, name, chosen = min(fitting)
    return Uniform(format=name, nbytes=selection.counted(problem.by_item(chosen)), cost=cost)


def uniform_choices(selection: Selection, problem: Problem) -> list[tuple[float, int, str, list[Candidate]]]:
    """(cost, bytes, format, choice) for every format that all items can have, whether or not it fits the capacity."""
    choices = []
    for name in sorted({c.format for item in problem.items for c in item.candidates}):
        chosen = one_format(problem, name, selection.optional)
        if chosen is not None:
            choices.append((problem.cost(chosen), problem.nbytes(chosen), name, chosen))
    return choices


def one_format(problem: Problem, name: str, optional: frozenset[str]) -> list[Candidate] | None:
    """The choice with every item in format `name`; None when an item lacks this format.

    Items with a single candidate keep that one. Items in `optional` (embedding, head) that lack the format take their
    cheapest candidate, the uncompressed one.
    """
    chosen = []
    for item in problem.items:
        matching = [c for c in item.candidates if c.format == name]
        if not matching and (len(item.candidates) == 1 or item.name in optional):
            matching = [min(item.candidates, key=lambda c: (c.cost, c.nbytes))]
        if not matching:
            return None
        chosen.append(matching[0])
    return chosen if any(c.format == name for c in chosen) else None


def uniform_plan(
    table: MeasuredTable, fmt: str, *, scope: Scope = "matrices", options: PlanOptions | None = None, work: str = ""
) -> Plan:
    """The plan with format `fmt` for every matrix that takes part; its budget is its own size.

    The ties, requirements and corrections in `options` have no effect. Embedding and head stay dense where they were
    not measured in `fmt`. Raises PlanError when any other matrix was not measured in it.
    """
    options = replace(options or PlanOptions(), ties="none", requirements=Requirements(), corrections={})
    selection = select(table, scope, options)
    unlimited = selection.problem(None)
    name = parsed_format(fmt, "format").name
    chosen = one_format(unlimited, name, selection.optional)
    if chosen is None:
        lacking = next(i for i in unlimited.items if all(c.format != name for c in i.candidates))
        measured = ", ".join(sorted(c.format for c in lacking.candidates))
        raise PlanError(f"format {name}: {lacking.name} was not measured in it; expected one of {measured}")
    problem = Problem(unlimited.items, unlimited.shared, unlimited.nbytes(chosen))
    relaxation = relax(problem)
    price = shadow_price(relaxation)
    lower_bound = min(max(relaxation.exact_bound(price), 0.0), fsum(c.cost for c in chosen))
    solution = Solution(chosen, lower_bound, lower_bound, price, finished=False)
    counted = selection.counted(problem.by_item(chosen))
    return assemble(
        selection,
        chosen=problem.by_item(chosen),
        runners_up={item.name: None for item in problem.items},
        bound=solution.bound(problem).model_copy(update={"solver": "none", "solver_version": ""}),
        budget=(f"uniform {name}", counted),
        uniform=Uniform(format=name, nbytes=counted, cost=problem.cost(chosen)),
        work=work,
    )
