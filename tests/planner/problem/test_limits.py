"""Limits and a maximum number of formats: equal to brute force, with bounds that hold and true explanations."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import limited_problems

from reallm.planner.problem.problem import Candidate, Item, Limit, Problem
from reallm.planner.solvers.ilp import build
from reallm.planner.solvers.lagrangian import relax
from reallm.planner.solvers.solve import OPTIMAL_GAP, least_stretch, optimise


def brute_force(problem: Problem) -> float | None:
    """The lowest cost of any choice that keeps all limits, by trying all."""
    choices = product(*(item.candidates for item in problem.items))
    return min((problem.cost(chosen) for chosen in choices if problem.fits(chosen)), default=None)


@settings(max_examples=200)
@given(limited_problems())
def test_equal_to_brute_force_and_proved(problem: Problem) -> None:
    best, solution = brute_force(problem), optimise(problem)
    if best is None:
        assert solution is None
        return
    assert solution is not None and problem.fits(solution.chosen)
    bound = solution.bound(problem)
    assert bound.objective == pytest.approx(best, rel=OPTIMAL_GAP, abs=1e-300)
    assert bound.status == "optimal" and bound.lagrangian_bound <= best


@given(limited_problems(), st.floats(0, 1e3), st.lists(st.floats(0, 1e3), min_size=2, max_size=2))
def test_the_bound_holds_at_all_prices(problem: Problem, price: float, prices: list[float]) -> None:
    best = brute_force(problem)
    assume(best is not None)
    assert relax(problem, prices[: len(problem.limits)]).exact_bound(price) <= best


@settings(max_examples=60)
@given(limited_problems())
def test_the_least_stretch_is_the_least(problem: Problem) -> None:
    """By brute force: the smallest share by which all capacities must grow so that some choice keeps them."""

    def share(chosen: tuple[Candidate, ...]) -> float:
        taken = [(problem.nbytes(chosen), problem.capacity)]
        taken += [(problem.limit_use(chosen, n), limit.capacity) for n, limit in enumerate(problem.limits)]
        return max(0.0, *(used / max(capacity, 1) - 1 for used, capacity in taken))

    limit = problem.max_formats
    choices = product(*(item.candidates for item in problem.items))
    expected = min((share(c) for c in choices if limit is None or len({x.format for x in c}) <= limit), default=None)
    stretch = least_stretch(problem)
    assert (stretch is None) == (expected is None)
    if stretch is not None and expected is not None:
        # a capacity of 0 cannot be stretched, so it counts as 1; HiGHS keeps constraints to 1e-9 of a unit
        assert stretch.share == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_a_limit_changes_the_plan_only_where_it_binds() -> None:
    light, heavy = Candidate(10, 1.0, "light", uses=(1,)), Candidate(20, 0.1, "heavy", uses=(5,))
    items = tuple(Item(f"m{i}", (light, heavy)) for i in range(4))
    roomy = optimise(Problem(items, {}, 80, (Limit("pool a", "bytes", 20),)))
    assert roomy is not None and roomy.chosen == [heavy] * 4 and roomy.prices == (0.0,)
    tight = optimise(Problem(items, {}, 80, (Limit("pool a", "bytes", 12),)))
    assert tight is not None and sorted(c.format for c in tight.chosen) == ["heavy", "heavy", "light", "light"]
    assert tight.prices[0] == pytest.approx(0.9 / 4, rel=2e-3)  # what one more unit saves in the relaxation


def test_few_formats_are_the_best_few() -> None:
    def item(name: str, *costs: float) -> Item:
        return Item(name, tuple(Candidate(1, cost, f"f{n}") for n, cost in enumerate(costs)))

    items = (item("a", 0.0, 9.0, 3.0), item("b", 9.0, 1.0, 3.0), item("c", 5.0, 5.0, 1.0))
    chosen = {}
    for count in (1, 2, 3):
        solution = optimise(Problem(items, {}, 3, max_formats=count))
        assert solution is not None
        chosen[count] = [c.format for c in solution.chosen]
    assert chosen == {1: ["f2", "f2", "f2"], 2: ["f0", "f2", "f2"], 3: ["f0", "f1", "f2"]}


def test_every_constraint_is_named() -> None:
    candidates = (Candidate(4, 1.0, "x", ("book",), (1,)), Candidate(8, 0.5, "y", (), (2,)))
    limits = (Limit("latency", "ns", 4, {"book": 1}),)
    model, _ = build(Problem((Item("m", candidates),), {"book": 4}, 8, limits, 1))
    names = {"budget", "limit_0", "choose_one_0", "shared_0_0", "in_use_0_0", "in_use_0_1", "formats"}
    assert set(model.constraints) == names


def test_invalid_problems_and_candidates_are_refused() -> None:
    with pytest.raises(ValueError, match="what it uses of each limit"):
        Problem((Item("m", (Candidate(1, 0.0, "x"),)),), {}, 1, (Limit("latency", "ns", 1),))
    with pytest.raises(ValueError, match="expected finite numbers"):
        Candidate(1, 0.0, "x", (), (-1,))
