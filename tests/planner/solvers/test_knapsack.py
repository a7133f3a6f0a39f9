"""The exact core: equal to brute force, the k best in order, and bounds that hold when it gives up."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reallm.planner.solvers.knapsack import Instance, solve_knapsack

LOOSE = 1e-9


@st.composite
def instances(draw: st.DrawFn) -> tuple[Instance, int]:
    """Up to 6 items with up to 5 candidates, with equal costs and bytes, and a capacity that some choice just fits."""
    counts = draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    width = max(counts)
    cost, nbytes = np.full((len(counts), width), np.inf), np.zeros((len(counts), width), np.int64)
    scale, widest = draw(st.sampled_from((1e-12, 1.0, 1e6))), draw(st.sampled_from((3, 60, 10**6)))
    for row, count in enumerate(counts):
        cost[row, :count] = [scale * draw(st.integers(0, 40)) / 7 for _ in range(count)]
        nbytes[row, :count] = [draw(st.integers(0, widest)) for _ in range(count)]
    picks = np.array([draw(st.integers(0, count - 1)) for count in counts])
    instance = Instance(cost, nbytes)
    return instance, max(instance.total(picks)[1] + draw(st.integers(-1, 1)), 0)


def by_brute_force(instance: Instance, capacity: int) -> list[tuple[float, int]]:
    every = product(*(np.flatnonzero(np.isfinite(row)) for row in instance.cost))
    totals = [instance.total(np.array(choice)) for choice in every]
    return sorted(total for total in totals if total[1] <= capacity)


@settings(max_examples=300)
@given(instances(), st.sampled_from((1, 2, 7)))
def test_equal_to_brute_force(drawn: tuple[Instance, int], count: int) -> None:
    instance, capacity = drawn
    expected, answer = by_brute_force(instance, capacity)[:count], solve_knapsack(instance, capacity, count)
    if answer is None:
        assert not expected
        return
    assert answer.optimal and len(answer.picks) == len(expected)
    assert len({tuple(picks) for picks in answer.picks}) == len(answer.picks)
    for picks, (cost, _) in zip(answer.picks, expected, strict=True):
        picked_cost, nbytes = instance.total(picks)
        assert nbytes <= capacity and picked_cost == pytest.approx(cost, rel=LOOSE, abs=0)
    assert answer.bound == pytest.approx(expected[0][0], rel=LOOSE, abs=0)


@given(instances())
def test_without_states_the_answer_is_feasible_and_its_bound_holds(drawn: tuple[Instance, int]) -> None:
    instance, capacity = drawn
    answer = solve_knapsack(instance, capacity, max_states=0)
    if answer is not None and not answer.optimal:
        cost, nbytes = instance.total(answer.picks[0])
        best = by_brute_force(instance, capacity)[0][0]
        assert nbytes <= capacity and answer.bound <= best * (1 + LOOSE) and best <= cost


def test_several_best_beyond_those_that_cost_nothing() -> None:
    """With costs of zero the first delta is zero, and multiplying it cannot make it grow."""
    instance = Instance(np.array([[0.0, 5.0], [0.0, 7.0]]), np.array([[4, 1], [4, 1]]))
    answer = solve_knapsack(instance, 8, count=4)
    assert answer is not None and [instance.total(picks)[0] for picks in answer.picks] == [0, 5, 7, 12]


def test_equal_matrices_do_not_blow_up() -> None:
    """400 copies of one item: the same choices in any order are one state."""
    cost, nbytes = (
        np.tile(np.array([[9.0, 3.0, 1.0, 0.3]]), (400, 1)),
        np.tile(np.array([[100, 207, 301, 402]]), (400, 1)),
    )
    answer = solve_knapsack(Instance(cost, nbytes.astype(np.int64)), 400 * 250)
    assert answer is not None and answer.optimal and answer.states < 1000


@pytest.mark.parametrize(
    ("cost", "nbytes", "message"),
    [
        ([[1.0, np.nan]], [[1, 1]], "not a number"),
        ([[-1.0]], [[1]], "negative"),
        ([[1.0]], [[-1]], "negative"),
        ([[1.0], [np.inf]], [[1], [1]], "item 1 has no candidate"),
        ([[1.0, 2.0]], [[1]], "differ in shape"),
        ([[]], [[]], "differ in shape"),
    ],
)
def test_impossible_instances_are_refused(cost: list[list[float]], nbytes: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Instance(np.array(cost, dtype=np.float64), np.array(nbytes, dtype=np.int64))
