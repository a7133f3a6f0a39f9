"""Solve the problem of choosing a format for every matrix, and prove how good the answer is.

1. A problem with one budget is solved by the exact core of `knapsack`; with shared codebooks or few formats, by the
   search of `branching`, which ends in such cores.
2. Limits are left out at first. If the optimum meets them anyway, it is also the optimum with them.
3. If the optimum exceeds a limit, or the core has too many states: prune dominated candidates -> compute a
   Lagrangian bound and a first solution -> drop the candidates that cannot be in a better one -> solve the rest with
   HiGHS.

In every case the bytes of the answer are added up again in integers, and its bound is checked in exact arithmetic.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Literal

import numpy as np

from reallm.planner.problem.problem import Candidate, Item, Problem
from reallm.planner.tables.plan import Bound
from reallm.planner.tables.units import MIB, PlanError

from .branching import Search
from .few_formats import few_formats
from .knapsack import Instance, solve_knapsack
from .lagrangian import Relaxation, incumbent, limit_prices, reduced_problem, relax, shadow_price

if TYPE_CHECKING:
    from .ilp import IlpResult, Objective

OPTIMAL_GAP = 1e-9
"""Largest relative gap of a plan that is called optimal."""
SOLVER = "HiGHS"
"""Name that a plan records as its solver when `ilp` found it."""
CORE = "reallm core"
"""Name that a plan records as its solver when the exact core or the search found it."""


@dataclass(frozen=True, slots=True)
class Solution:
    """A choice, and what is known about the optimum."""

    chosen: list[Candidate]
    best_bound: float
    """Lower bound of the cost as reported by the solver."""
    lagrangian_bound: float
    """Lower bound of the cost in exact arithmetic."""
    price: float
    """Cost per byte."""
    finished: bool
    """Whether the solver finished its search."""
    solver: str = SOLVER
    prices: tuple[float, ...] = ()
    """Price of each limit, cost per unit."""

    def bound(self, problem: Problem) -> Bound:
        """The proof, with the status "optimal" only if the bounds agree with the cost.

        Raises ArithmeticError when the cost is below a lower bound, which would be a fault of a solver.
        """
        objective = problem.cost(self.chosen)
        if self.lagrangian_bound > objective:
            raise ArithmeticError(f"cost {objective} is below its own lower bound {self.lagrangian_bound}")
        best_bound = min(objective, max(self.best_bound, self.lagrangian_bound))
        gap = (objective - best_bound) / objective if objective else 0.0
        status: Literal["optimal", "feasible"] = "optimal" if self.finished and gap <= OPTIMAL_GAP else "feasible"
        return Bound(
            solver=self.solver,
            solver_version=_highs_version() if self.solver == SOLVER else version("reallm"),
            status=status,
            objective=objective,
            best_bound=best_bound,
            mip_gap=gap,
            lagrangian_bound=self.lagrangian_bound,
            shadow_price=self.price * MIB,
        )


def optimise(problem: Problem, time_limit_s: float = 60.0) -> Solution | None:
    """The best choice for `problem`; None when there is none. Raises PlanError if the time ran out first."""
    start, unlimited = time.monotonic(), _without_limits(problem)
    solutions = cheapest_solutions(unlimited, 1, time_limit_s)
    if solutions == [None]:
        return None
    free = solutions[0] if solutions else None
    if free is not None and not problem.limits and (free.finished or not problem.is_knapsack):
        return free
    if free is not None and free.finished:
        chosen = problem.choice_of({item: c.format for item, c in unlimited.by_item(free.chosen).items()})
        if problem.fits(chosen):
            return replace(free, chosen=chosen, prices=(0.0,) * len(problem.limits))
    return _by_ilp(problem.pruned(), max(time_limit_s - (time.monotonic() - start), 0.0))


def cheapest_solutions(problem: Problem, count: int, time_limit_s: float = 60.0) -> list[Solution | None]:
    """The `count` cheapest choices of a problem without limits, the best first; fewer where fewer exist.

    Returns [None] when nothing fits. If the core has too many states or the time runs out, returns the choices found so
    far (perhaps none), without a proof.
    """
    if problem.is_knapsack:
        return _by_core(problem, count)
    return _by_branching(problem, count, time_limit_s)


def _by_core(problem: Problem, count: int) -> list[Solution | None]:
    answer = solve_knapsack(instance_of(problem), problem.capacity, count)
    if answer is None:
        return [None]
    lower_bound, solutions = max(relax(problem).exact_bound(answer.price), 0.0), list[Solution | None]()
    for picks in answer.picks:
        chosen = [item.candidates[pick] for item, pick in zip(problem.items, picks.tolist(), strict=True)]
        _require_fit(problem, chosen)
        solutions.append(Solution(chosen, answer.bound, lower_bound, answer.price, answer.optimal, CORE))
    return solutions


def _by_branching(problem: Problem, count: int, time_limit_s: float) -> list[Solution | None]:
    result = Search(problem, count).run(time_limit_s)
    if result is None:
        return [None]
    lower_bound = max(relax(problem).exact_bound(result.price), 0.0)
    for chosen in result.choices:
        _require_fit(problem, chosen)
    return [
        Solution(chosen, result.bound, lower_bound, result.price, result.finished, CORE) for chosen in result.choices
    ]


def instance_of(problem: Problem) -> Instance:
    """Costs and bytes of the candidates of a problem as arrays [items, candidates], in the order of the problem."""
    width = max(len(item.candidates) for item in problem.items)
    cost, nbytes = np.full((len(problem.items), width), np.inf), np.zeros((len(problem.items), width), np.int64)
    for row, item in enumerate(problem.items):
        cost[row, : len(item.candidates)] = [c.cost for c in item.candidates]
        nbytes[row, : len(item.candidates)] = [c.nbytes for c in item.candidates]
    return Instance(cost, nbytes)


def _solve_ilp(problem: Problem, time_limit_s: float, objective: Objective = "cost") -> IlpResult:
    """Solve with HiGHS, which most problems do not need: only those that do import it."""
    from .ilp import solve_ilp

    return solve_ilp(problem, time_limit_s, objective)


def _highs_version() -> str:
    """The versions of HiGHS and PuLP, as text."""
    return f"{version('highspy')} (PuLP {version('pulp')})"


def _by_ilp(problem: Problem, time_limit_s: float) -> Solution | None:
    prices = limit_prices(problem)
    relaxation = relax(problem, prices)
    price = shadow_price(relaxation)
    lower_bound = max(relaxation.exact_bound(price), 0.0)
    first = _first_solution(problem, relaxation, price)
    rest = problem if first is None else reduced_problem(relaxation, price, problem.cost(first))
    result = _solve_ilp(rest, time_limit_s)
    if result.status == "infeasible" and first is None:
        return None
    choices = [list(choice) for choice in (result.chosen, first) if choice is not None]
    if not choices:
        raise PlanError(f"no plan was found within {time_limit_s:g} s; give --time-limit more seconds")
    best = min(choices, key=lambda choice: (problem.cost(choice), problem.nbytes(choice)))
    _require_fit(problem, best)
    return Solution(best, result.best_bound, lower_bound, price, result.status == "optimal", prices=prices)


def _first_solution(problem: Problem, relaxation: Relaxation, price: float) -> list[Candidate] | None:
    """A good choice to start from; None when none was found."""
    if problem.max_formats is None:
        return incumbent(relaxation, price)

    def solve(inner: Problem) -> list[Candidate] | None:
        solution = cheapest_solutions(inner, 1)[0] if inner.is_knapsack else None
        if solution is not None:
            return solution.chosen
        inner_relaxation = relax(inner, relaxation.prices)
        return incumbent(inner_relaxation, shadow_price(inner_relaxation))

    return few_formats(problem, problem.max_formats, relaxation.prices, solve)


def _require_fit(problem: Problem, chosen: list[Candidate]) -> None:
    if not problem.fits(chosen):
        raise ArithmeticError(f"a plan takes {problem.nbytes(chosen)} bytes, more than the capacity {problem.capacity}")


def smallest_bytes(problem: Problem, time_limit_s: float = 60.0) -> int:
    """The fewest bytes that any choice takes, ignoring the limits and the maximum number of formats."""
    problem = replace(_without_limits(problem), max_formats=None)
    lightest = [min(item.candidates, key=lambda c: c.nbytes) for item in problem.items]
    result = _solve_ilp(problem, time_limit_s, objective="bytes") if problem.shared else None
    chosen = list(result.chosen) if result and result.chosen else lightest
    return min(problem.nbytes(chosen), problem.nbytes(lightest))


def _without_limits(problem: Problem) -> Problem:
    """The problem without its limits, but with its budget and its maximum number of formats."""
    items = (Item(item.name, tuple(replace(c, uses=()) for c in item.candidates)) for item in problem.items)
    return replace(problem, limits=(), items=tuple(items)) if problem.limits else problem


@dataclass(frozen=True, slots=True)
class Stretch:
    """How much all capacities must grow, by the same share, so that some choice stays within them."""

    share: float
    """The share by which they grow: 0.1 for 10%."""
    nbytes: int
    """Bytes of the budget that such a choice takes."""
    used: tuple[int, ...]
    """What such a choice uses of each limit."""


def least_stretch(problem: Problem, time_limit_s: float = 60.0) -> Stretch | None:
    """The smallest stretch that makes an infeasible problem feasible; None when too few formats are allowed."""
    result = _solve_ilp(problem, time_limit_s, objective="stretch")
    if result.chosen is None:
        return None
    chosen = list(result.chosen)
    nbytes, used = problem.nbytes(chosen), tuple(problem.limit_use(chosen, n) for n in range(len(problem.limits)))
    uses = [(nbytes, problem.capacity), *((u, limit.capacity) for u, limit in zip(used, problem.limits, strict=True))]
    return Stretch(max(0.0, *(use / max(capacity, 1) - 1 for use, capacity in uses)), nbytes, used)
