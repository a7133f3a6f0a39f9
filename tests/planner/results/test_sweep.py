"""A sweep: every point is the plan for its budget, losses fall, and the ends may be swapped."""

from __future__ import annotations

import csv
import io
import itertools

import pytest
from hypothesis import given, settings
from strategies import make_table, tables

from reallm.planner.problem.plan_options import PlanOptions
from reallm.planner.results.allocate import solve
from reallm.planner.results.sweep import as_csv, spaced_budgets, sweep
from reallm.planner.solvers.solve import OPTIMAL_GAP
from reallm.planner.tables.budget import parse_budget
from reallm.planner.tables.measured_table import MeasuredTable
from reallm.planner.tables.units import PlanError

COSTS = {"uint4-g64+ldl": 0.1, "uint2-g64+ldl": 0.9, "tq4-l12+ldl2+rot": 0.01, "int8-g64": 0.001}
TABLE = make_table(("blocks.0.q", 64, 128, "linear", COSTS), ("blocks.1.q", 64, 128, "linear", COSTS))


@settings(max_examples=40)
@given(tables())
def test_every_point_is_the_plan_for_its_budget(table: MeasuredTable) -> None:
    budgets = spaced_budgets("1bpw", "17bpw", 5)
    try:
        points = sweep(table, budgets, PlanOptions())
    except PlanError:
        with pytest.raises(PlanError):
            solve(table, budgets[-1])
        return
    assert len(points) <= len(budgets)
    for point in points:
        plan = solve(table, point.budget)
        assert (point.counted_bytes, point.budget_bytes) == (plan.counted_bytes, plan.budget_bytes)
        assert point.predicted_loss == pytest.approx(plan.predicted_loss, rel=OPTIMAL_GAP)
        assert point.status == plan.bound.status == "optimal"
        assert (point.uniform_loss, point.uniform) == (
            (None, "") if plan.uniform is None else (plan.uniform.cost, plan.uniform.format)
        )
    losses = [point.predicted_loss for point in points]
    assert all(later <= sooner * (1 + OPTIMAL_GAP) for sooner, later in itertools.pairwise(losses))


def test_swapped_ends_are_the_same_sweep() -> None:
    assert spaced_budgets("5bpw", "2bpw", 4) == spaced_budgets("2bpw", "5bpw", 4)
    assert [budget.text for budget in spaced_budgets("2bpw", "5bpw", 4)] == ["2bpw", "3bpw", "4bpw", "5bpw"]


def test_budgets_without_a_plan_are_left_out_and_none_left_is_an_error() -> None:
    assert len(sweep(TABLE, spaced_budgets("1bpw", "5bpw", 5), PlanOptions())) == 3
    with pytest.raises(
        PlanError, match=r"--budget 2bpw is 4096 bytes, the smallest plan takes .* ask for 2\.\d+bpw or more"
    ):
        sweep(TABLE, spaced_budgets("1bpw", "2bpw", 3), PlanOptions())


@pytest.mark.parametrize(("first", "last", "points"), [("2bpw", "3MiB", 5), ("2bpw", "5bpw", 1), ("x", "5bpw", 2)])
def test_impossible_sweeps_are_refused(first: str, last: str, points: int) -> None:
    with pytest.raises(PlanError):
        spaced_budgets(first, last, points)


def test_csv_reads_back() -> None:
    points = sweep(TABLE, [parse_budget("3bpw"), parse_budget("6bpw")], PlanOptions())
    read = list(csv.DictReader(io.StringIO(as_csv(points))))
    assert [float(row["predicted_loss"]) for row in read] == [point.predicted_loss for point in points]
    assert [row["uniform"] for row in read] == [point.uniform for point in points]
