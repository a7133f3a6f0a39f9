"""Optimisation: equal to brute force, with bounds that hold, in any order of the input."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product
from math import inf

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import problems

from reallm.planner.problem.problem import Candidate, Item, Limit, Problem, needed_codebooks
from reallm.planner.solvers.branching import NO, YES, Node, Search
from reallm.planner.solvers.ilp import build, solve_ilp
from reallm.planner.solvers.lagrangian import incumbent, reduced_problem, relax, runners_up, shadow_price
from reallm.planner.solvers.solve import CORE, OPTIMAL_GAP, cheapest_solutions, optimise, smallest_bytes

# Solver and brute force may differ by the gap that still counts as optimal; sums of four floats add 4 ulp.
REL = OPTIMAL_GAP


def brute_force(problem: Problem) -> float | None:
    """The lowest cost of any choice that fits, by trying all."""
    return min(all_costs(problem), default=None)


def all_costs(problem: Problem) -> list[float]:
    """The cost of every choice that fits."""
    choices = product(*(item.candidates for item in problem.items))
    return [problem.cost(chosen) for chosen in choices if problem.fits(chosen)]


@settings(max_examples=150)
@given(problems())
def test_equal_to_brute_force_and_proved(problem: Problem) -> None:
    best, solution = brute_force(problem), optimise(problem)
    if best is None:
        assert solution is None
        return
    assert solution is not None
    bound = solution.bound(problem)
    assert problem.nbytes(solution.chosen) <= problem.capacity
    assert bound.objective == problem.cost(solution.chosen)
    assert bound.objective == pytest.approx(best, rel=REL, abs=1e-300)
    assert bound.status == "optimal" and bound.mip_gap <= OPTIMAL_GAP
    assert bound.lagrangian_bound <= best


@settings(max_examples=150)
@given(problems(), st.integers(1, 4), st.integers(1, 5))
def test_the_cheapest_choices_equal_brute_force(problem: Problem, max_formats: int, count: int) -> None:
    problem = replace(problem, max_formats=max_formats)
    costs, solutions = sorted(all_costs(problem)), cheapest_solutions(problem, count)
    if not costs:
        assert solutions == [None]
        return
    assert [problem.cost(solution.chosen) for solution in solutions] == pytest.approx(
        costs[:count], rel=REL, abs=1e-300
    )
    assert len({tuple(c.format for c in solution.chosen) for solution in solutions}) == len(solutions)
    for solution in solutions:
        assert problem.fits(solution.chosen) and solution.finished
        assert solution.lagrangian_bound <= costs[0] and solution.best_bound == pytest.approx(costs[0], rel=REL)


@settings(max_examples=50)
@given(problems(), st.integers(1, 4))
def test_every_bound_of_the_search_holds(problem: Problem, max_formats: int) -> None:
    """No node has a choice below its bound, and no dropped node has a better choice than the best known."""
    problem = replace(problem, max_formats=max_formats)
    search = Search(problem)
    choices = [c for c in product(*(item.candidates for item in problem.items)) if problem.fits(c)]

    def lowest_cost(node: Node) -> float:
        formats = {name for name, state in zip(search.names, node.formats, strict=True) if state != NO}
        counted = {name for name, state in zip(search.names, node.formats, strict=True) if state == YES}
        books = {key for key, state in zip(search.keys, node.books, strict=True) if state != NO}
        paid = {key for key, state in zip(search.keys, node.books, strict=True) if state == YES}
        costs = []
        for chosen in choices:
            stored = {key for c in chosen for key in c.shared}
            unused = sum(problem.shared[key] for key in paid - stored)
            used = {c.format for c in chosen}
            inside = stored <= books and used <= formats and len(used | counted) <= max_formats
            if inside and problem.nbytes(chosen) + unused <= problem.capacity:
                costs.append(problem.cost(chosen))
        return min(costs, default=inf)

    root = search.root()
    nodes = [root.with_book(b, state) for b in range(len(search.keys)) for state in (YES, NO)]
    nodes += [root.with_format(f, state) for f in range(len(search.names)) for state in (YES, NO)]
    for node in (root, *nodes):
        bounded = search.bounded(node)
        assert (bounded.bound if bounded else search.ceiling) <= lowest_cost(node) * (1 + REL)


@given(problems(), st.floats(0, 1e3))
def test_the_lagrangian_bound_holds_at_every_price(problem: Problem, price: float) -> None:
    best = brute_force(problem)
    assume(best is not None)
    assert relax(problem).exact_bound(price) <= best


@given(problems())
def test_first_solutions_are_feasible_and_nothing_better_is_dropped(problem: Problem) -> None:
    problem = problem.pruned()
    relaxation = relax(problem)
    price = shadow_price(relaxation)
    first = incumbent(relaxation, price)
    assume(first is not None)
    assert problem.nbytes(first) <= problem.capacity
    rest = reduced_problem(relaxation, price, problem.cost(first))
    assert brute_force(rest) == brute_force(problem)


@given(problems())
def test_dominated_candidates_are_never_needed(problem: Problem) -> None:
    assert brute_force(problem.pruned()) == brute_force(problem)


@given(problems())
def test_smallest_bytes_is_the_smallest(problem: Problem) -> None:
    assert smallest_bytes(problem) == min(map(problem.nbytes, product(*(i.candidates for i in problem.items))))


@settings(max_examples=50)
@given(problems(), st.integers(0, 2000))
def test_more_capacity_never_costs_more(problem: Problem, more: int) -> None:
    less = optimise(problem)
    assume(less is not None)
    roomy = optimise(Problem(problem.items, problem.shared, problem.capacity + more))
    assert roomy is not None
    assert problem.cost(roomy.chosen) <= problem.cost(less.chosen) * (1 + REL)


@settings(max_examples=50)
@given(problems(), st.randoms(use_true_random=False))
def test_order_does_not_matter(problem: Problem, shuffle: random.Random) -> None:
    items = []
    for item in problem.items:
        candidates = list(item.candidates)
        shuffle.shuffle(candidates)
        items.append(Item(item.name, tuple(candidates)))
    shuffle.shuffle(items)
    shuffled = Problem(tuple(items), dict(reversed(problem.shared.items())), problem.capacity)
    assert shuffled == problem
    assert optimise(shuffled) == optimise(problem)


@settings(max_examples=50)
@given(problems())
def test_core_and_integer_program_agree(problem: Problem) -> None:
    problem = Problem(
        tuple(Item(i.name, tuple(replace(c, shared=()) for c in i.candidates)) for i in problem.items),
        {},
        problem.capacity,
    )
    solution, checked = optimise(problem), solve_ilp(problem, 60.0)
    assert (solution is None) == (checked.chosen is None)
    if solution is not None and checked.chosen is not None:
        assert solution.solver == CORE
        assert problem.cost(solution.chosen) == pytest.approx(problem.cost(checked.chosen), rel=REL, abs=1e-300)


def test_a_shared_codebook_is_paid_for_once() -> None:
    book = Candidate(10, 1.0, "shared", ("book",))
    alone = Candidate(60, 2.0, "alone")
    items = tuple(Item(f"m{i}", (book, alone)) for i in range(3))
    # Three with the codebook take 30 + 100; two of them and one alone would take 20 + 100 + 60.
    solution = optimise(Problem(items, {"book": 100}, 130))
    assert solution is not None and solution.chosen == [book] * 3
    cramped = optimise(Problem(items, {"book": 100}, 129))
    assert cramped is None
    roomy = optimise(Problem(items, {"book": 200}, 229))
    assert roomy is not None and roomy.chosen == [alone] * 3


def test_costs_of_any_magnitude_are_solved_exactly() -> None:
    """The solver's absolute tolerances have no effect: the same problem with costs scaled by 1e-12 and 1e6."""
    shuffle = random.Random(3)
    base = [[(shuffle.randrange(1, 500) * 64, shuffle.random()) for _ in range(5)] for _ in range(7)]
    for scale in (1e-12, 1.0, 1e6):
        items = tuple(
            Item(f"m{i}", tuple(Candidate(b, c * scale, f"f{n}") for n, (b, c) in enumerate(row)))
            for i, row in enumerate(base)
        )
        problem = Problem(items, {}, sum(min(row)[0] for row in base) + 30_000)
        solution = optimise(problem)
        assert solution is not None
        assert problem.cost(solution.chosen) == pytest.approx(brute_force(problem), rel=REL)
        assert solution.bound(problem).status == "optimal"


def test_the_price_is_what_a_byte_saves() -> None:
    # Each further kilobyte buys the next item; they save 8, 4, 2 and 1 per kilobyte.
    items = tuple(Item(f"m{i}", (Candidate(0, float(8 >> i), "low"), Candidate(1024, 0.0, "high"))) for i in range(4))
    relaxation = relax(Problem(items, {}, 2048))
    price = shadow_price(relaxation) * 1024
    assert 2.0 * (1 - 1e-12) <= price <= 4.0  # anything between the last bought and the first left out


def test_runner_up_is_next_in_cost_plus_price() -> None:
    low, middle, high = Candidate(0, 9.0, "low"), Candidate(1, 4.0, "middle"), Candidate(2, 3.5, "high")
    problem = Problem((Item("m", (low, middle, high)), Item("n", (low,))), {}, 2)
    assert runners_up(problem, [middle, low], price=1.0) == ["high", None]  # 5.5 against 9
    assert runners_up(problem, [middle, low], price=6.0) == ["low", None]  # 15.5 against 9


def test_a_time_limit_is_never_called_optimal() -> None:
    shuffle = random.Random(0)
    items = tuple(
        Item(
            f"m{i}",
            tuple(
                Candidate(64 * shuffle.randrange(99, 9999), shuffle.random(), f"f{c}", (), (shuffle.randrange(9),))
                for c in range(40)
            ),
        )
        for i in range(60)
    )
    capacity = sum(i.candidates[0].nbytes for i in items) + 64 * 60_000
    problem = Problem(items, {}, capacity, (Limit("latency", "ns", 90),))
    solution = optimise(problem, time_limit_s=0.0)
    assert solution is not None
    bound = solution.bound(problem)
    assert problem.nbytes(solution.chosen) <= problem.capacity
    assert bound.status == "feasible" and bound.lagrangian_bound <= bound.best_bound <= bound.objective


def test_a_search_cut_short_says_so() -> None:
    shuffle = random.Random(0)
    items = tuple(
        Item(f"m{i}", tuple(Candidate(64 * shuffle.randrange(1, 99), shuffle.random(), f"f{c}") for c in range(30)))
        for i in range(40)
    )
    problem = Problem(items, {}, 64 * 40 * 20, max_formats=4)
    cut = Search(problem).run(0.0)
    assert cut is not None and not cut.finished and problem.fits(cut.choices[0])
    longer = Search(problem).run(3.0)
    assert longer is not None
    assert cut.bound <= longer.bound <= problem.cost(longer.choices[0]) <= problem.cost(cut.choices[0])
    assert cut.bound < problem.cost(longer.choices[0])


def test_no_time_is_not_taken_for_no_plan() -> None:
    items = tuple(
        Item(f"m{i}", (Candidate(10, 3.0, "low"), Candidate(20, 1.0, "book", ("b",)), Candidate(90, 0.0, "high")))
        for i in range(20)
    )
    problem = Problem(items, {"b": 50}, 900)
    assert cheapest_solutions(problem, 2, time_limit_s=0.0) == []
    hurried, best = optimise(problem, time_limit_s=0.0), optimise(problem)
    assert hurried is not None and problem.fits(hurried.chosen) and best is not None and best.finished
    assert problem.cost(best.chosen) <= problem.cost(hurried.chosen)


def test_the_integer_program_is_as_documented() -> None:
    book = Candidate(64, 1.0, "shared", ("book",))
    problem = Problem((Item("a", (book, Candidate(128, 0.5, "alone"))), Item("b", (book,))), {"book": 640}, 1000)
    model, x = build(problem)
    assert [len(row) for row in x] == [2, 1]
    assert list(model.constraints) == ["budget", "choose_one_0", "shared_0_0", "choose_one_1", "shared_1_0"]
    assert str(model.constraints["budget"]) == "x_0_0 + 2*x_0_1 + x_1_0 + 10*y_0 <= 15.0"
    assert solve_ilp(problem, 10.0).best_bound == pytest.approx(1.5, rel=REL)


@pytest.mark.parametrize("bad", [{"nbytes": -1}, {"cost": -1.0}, {"cost": float("nan")}, {"cost": float("inf")}])
def test_impossible_candidates_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected finite numbers"):
        Candidate(**{"nbytes": 1, "cost": 1.0, "format": "f", **bad})


def test_impossible_problems_are_refused() -> None:
    one = Candidate(1, 1.0, "f")
    with pytest.raises(ValueError, match="expected at least one"):
        Item("m", ())
    with pytest.raises(ValueError, match="each format once"):
        Item("m", (one, Candidate(2, 0.5, "f")))
    with pytest.raises(ValueError, match="same name"):
        Problem((Item("m", (one,)), Item("m", (one,))), {}, 1)
    with pytest.raises(ValueError, match="'book' has no size"):
        Problem((Item("m", (Candidate(1, 1.0, "f", ("book",)),)),), {}, 1)
    assert needed_codebooks([one]) == set()
