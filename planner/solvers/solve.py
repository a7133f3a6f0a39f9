"""Solving one allocation problem, with a proof.

With one budget the exact core of `knapsack` solves it; where codebooks are shared or formats are to be few, the search
of `branching` down to such cores. Further limits are left out at first: a choice that keeps them anyway is the optimum.
Where they bind, and where the core's states run out: prune dominated candidates -> Lagrangian bound and a first
solution -> drop what cannot be in a better one -> HiGHS on the rest. In any case everything is added up again in
integers, beside a bound in exact arithmetic.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Literal

import numpy as np

from reallm.planner.problem.problem import Candidate, Item, Problem
from reallm.planner.tables.plan import Bound
from reallm.planner.tables.units import MIB, PlanError

from .branching import Search
from .few_formats import few_formats
from .ilp import SOLVER, solve_ilp, solver_version
from .knapsack import Instance, solve_knapsack
from .lagrangian import Relaxation, incumbent, limit_prices, reduced, relax, shadow_price

OPTIMAL_GAP = 1e-9

CORE = "reallm core"


@dataclass(frozen=True, slots=True)
class Solution:
    """A choice, what is known of the optimum, and the price of a byte."""

    chosen: list[Candidate]
    best_bound: float
    lagrangian_bound: float
    price: float
    finished: bool
    solver: str = SOLVER
    prices: tuple[float, ...] = ()
    """Of the limits, cost per unit."""

    def bound(self, problem: Problem) -> Bound:
        """The proof: "optimal" only when the bounds agree with the cost."""
        objective = problem.cost(self.chosen)
        if self.lagrangian_bound > objective:
            raise ArithmeticError(f"cost {objective} lies under its own lower bound {self.lagrangian_bound}")
        best_bound = min(objective, max(self.best_bound, self.lagrangian_bound))
        gap = (objective - best_bound) / objective if objective else 0.0
        status: Literal["optimal", "feasible"] = "optimal" if self.finished and gap <= OPTIMAL_GAP else "feasible"
        return Bound(
            solver=self.solver,
            solver_version=solver_version() if self.solver == SOLVER else version("reallm"),
            status=status,
            objective=objective,
            best_bound=best_bound,
            mip_gap=gap,
            lagrangian_bound=self.lagrangian_bound,
            shadow_price=self.price * MIB,
        )


def optimise(problem: Problem, time_limit_s: float = 60.0) -> Solution | None:
    """The best choice for `problem`, or None when there is none. Raises PlanError when time ran out without any."""
    began, unlimited = time.monotonic(), _without_limits(problem)
    found = optimise_all(unlimited, 1, time_limit_s)
    if found == [None]:
        return None
    free = found[0] if found else None
    if free is not None and not problem.limits and (free.finished or not problem.plain):
        return free
    if free is not None and free.finished:
        chosen = problem.by_names({item: c.format for item, c in unlimited.by_name(free.chosen).items()})
        if problem.fits(chosen):
            return replace(free, chosen=chosen, prices=(0.0,) * len(problem.limits))
    return _by_ilp(problem.pruned(), max(time_limit_s - (time.monotonic() - began), 0.0))


def optimise_all(problem: Problem, count: int, time_limit_s: float = 60.0) -> list[Solution | None]:
    """The `count` cheapest choices of a problem without limits, the best first, fewer where there are not so many.

    [None] when there is none. Where the core's states or the time ran out, those found so far, maybe none, are not
    proved.
    """
    if problem.plain:
        return _by_core(problem, count)
    return _by_branching(problem, count, time_limit_s)


def _by_core(problem: Problem, count: int) -> list[Solution | None]:
    answer = solve_knapsack(instance_of(problem), problem.capacity, count)
    if answer is None:
        return [None]
    lower, solutions = max(relax(problem).exact_bound(answer.price), 0.0), list[Solution | None]()
    for picks in answer.picks:
        chosen = [item.candidates[pick] for item, pick in zip(problem.items, picks.tolist(), strict=True)]
        solutions.append(Solution(_fitting(problem, chosen), answer.bound, lower, answer.price, answer.optimal, CORE))
    return solutions


def _by_branching(problem: Problem, count: int, time_limit_s: float) -> list[Solution | None]:
    found = Search(problem, count).run(time_limit_s)
    if found is None:
        return [None]
    lower = max(relax(problem).exact_bound(found.price), 0.0)
    return [
        Solution(_fitting(problem, chosen), found.bound, lower, found.price, found.finished, CORE)
        for chosen in found.choices
    ]


def instance_of(problem: Problem) -> Instance:
    """The items and candidates as arrays, in their order."""
    most = max(len(item.candidates) for item in problem.items)
    cost, nbytes = np.full((len(problem.items), most), np.inf), np.zeros((len(problem.items), most), np.int64)
    for row, item in enumerate(problem.items):
        cost[row, : len(item.candidates)] = [c.cost for c in item.candidates]
        nbytes[row, : len(item.candidates)] = [c.nbytes for c in item.candidates]
    return Instance(cost, nbytes)


def _by_ilp(problem: Problem, time_limit_s: float) -> Solution | None:
    prices = limit_prices(problem)
    relaxation = relax(problem, prices)
    price = shadow_price(relaxation)
    lower = max(relaxation.exact_bound(price), 0.0)
    first = _first(problem, relaxation, price)
    rest = problem if first is None else reduced(relaxation, price, problem.cost(first))
    result = solve_ilp(rest, time_limit_s)
    if result.status == "infeasible" and first is None:
        return None
    found = [list(choice) for choice in (result.chosen, first) if choice is not None]
    if not found:
        raise PlanError(f"no plan was found within {time_limit_s:g} s; give --time-limit more seconds")
    best = min(found, key=lambda choice: (problem.cost(choice), problem.nbytes(choice)))
    finished = result.status == "optimal"
    return Solution(_fitting(problem, best), result.best_bound, lower, price, finished, prices=prices)


def _first(problem: Problem, relaxation: Relaxation, price: float) -> list[Candidate] | None:
    """A good choice to start from."""
    if problem.max_formats is None:
        return incumbent(relaxation, price)

    def solve(inner: Problem) -> list[Candidate] | None:
        found = optimise_all(inner, 1)[0] if inner.plain else None
        if found is not None:
            return found.chosen
        again = relax(inner, relaxation.prices)
        return incumbent(again, shadow_price(again))

    return few_formats(problem, problem.max_formats, relaxation.prices, solve)


def _fitting(problem: Problem, chosen: list[Candidate]) -> list[Candidate]:
    if not problem.fits(chosen):
        raise ArithmeticError(f"a plan of {problem.nbytes(chosen)} bytes for a capacity of {problem.capacity}")
    return chosen


def smallest_bytes(problem: Problem, time_limit_s: float = 60.0) -> int:
    """The fewest bytes any choice takes, limits left out."""
    problem = replace(_without_limits(problem), max_formats=None)
    lightest = [min(item.candidates, key=lambda c: c.nbytes) for item in problem.items]
    result = solve_ilp(problem, time_limit_s, objective="bytes") if problem.shared else None
    chosen = list(result.chosen) if result and result.chosen else lightest
    return min(problem.nbytes(chosen), problem.nbytes(lightest))


def _without_limits(problem: Problem) -> Problem:
    items = (Item(item.name, tuple(replace(c, uses=()) for c in item.candidates)) for item in problem.items)
    return replace(problem, limits=(), items=tuple(items)) if problem.limits else problem


@dataclass(frozen=True, slots=True)
class Stretch:
    """The least that all capacities must grow by, the same share each, for some choice to keep them."""

    share: float
    nbytes: int
    """What such a choice takes of the budget."""
    used: tuple[int, ...]
    """And of each limit."""


def least_stretch(problem: Problem, time_limit_s: float = 60.0) -> Stretch | None:
    """What would have to give for an infeasible problem to have a choice; None when the formats are too few."""
    result = solve_ilp(problem, time_limit_s, objective="stretch")
    if result.chosen is None:
        return None
    chosen = list(result.chosen)
    nbytes, used = problem.nbytes(chosen), tuple(problem.used(chosen, n) for n in range(len(problem.limits)))
    taken = [(nbytes, problem.capacity), *((u, limit.capacity) for u, limit in zip(used, problem.limits, strict=True))]
    return Stretch(max(0.0, *(u / max(capacity, 1) - 1 for u, capacity in taken)), nbytes, used)
