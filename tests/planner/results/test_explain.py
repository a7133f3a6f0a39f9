"""Plans explained: the k best equal brute force, differences add up, regrets are never negative."""

from __future__ import annotations

from itertools import product

import pytest
from strategies import make_table

from reallm.planner.problem.plan_options import PlanOptions
from reallm.planner.results.allocate import best_plans, solve
from reallm.planner.results.differences import differences
from reallm.planner.results.explain import alternatives, larger_plan
from reallm.planner.tables.units import PlanError

COSTS = {"uint4-g64+ldl": 0.1, "uint2-g64+ldl": 0.9, "tq4-l12+ldl2+rot": 0.01, "int8-g64": 0.001}
TABLE = make_table(
    ("blocks.0.q", 64, 128, "linear", COSTS),
    ("blocks.1.q", 64, 128, "linear", {name: 3.1 * cost for name, cost in COSTS.items()}),
    ("blocks.2.q", 128, 64, "linear", {name: 0.7 * cost for name, cost in COSTS.items()}),
)


def test_the_best_plans_in_order() -> None:
    plans = best_plans(TABLE, "5bpw", PlanOptions(formats=tuple(COSTS)), 6)
    sizes = [{c.format: c.nbytes for c in solve(TABLE, "30bpw", pins=[f".={f}"]).choices} for f in COSTS]
    nbytes = {name: size for one in sizes for name, size in one.items()}
    every = [
        sum(scale * COSTS[f] for scale, f in zip((1, 3.1, 0.7), formats, strict=True))
        for formats in product(COSTS, repeat=3)
        if sum(nbytes[f] for f in formats) <= plans[0].budget_bytes
    ]
    assert [plan.predicted_loss for plan in plans] == pytest.approx(sorted(every)[:6])
    assert all(plan.counted_bytes <= plan.budget_bytes for plan in plans)
    assert plans[0] == solve(TABLE, "5bpw", formats=list(COSTS))
    assert all(len(differences(plans[0], other)) > 0 for other in plans[1:])


def test_differences_add_up() -> None:
    small, large = solve(TABLE, "3bpw"), solve(TABLE, "9bpw")
    changes = differences(small, large)
    assert sum(c.nbytes for c in changes) == large.matrices_bytes - small.matrices_bytes
    assert sum(c.cost for c in changes) == pytest.approx(large.predicted_loss - small.predicted_loss)
    assert differences(small, small) == []
    excluded = differences(small, solve(TABLE, "3bpw", exclude=["blocks.0"]))
    assert ("blocks.0.q", "as it is") in {(c.matrix, c.after) for c in excluded}


def test_plans_of_two_models_are_not_compared() -> None:
    plan = solve(TABLE, "3bpw")
    with pytest.raises(PlanError, match="different models"):
        differences(plan, plan.model_copy(update={"model_sha256": "0" * 64}))


def test_the_chosen_candidate_has_no_regret_and_none_has_less() -> None:
    plan = solve(TABLE, "4.7bpw")
    options = alternatives(TABLE, plan, r"blocks\.[01]")
    assert len(options) == 2 * (len(COSTS) + 1)
    assert {(a.matrix, a.format) for a in options if a.chosen} == {(c.matrix, c.format) for c in plan.choices[:2]}
    assert all(a.regret == 0 for a in options if a.chosen)
    gap = plan.bound.objective - plan.bound.lagrangian_bound  # what the relaxed choice can gain at this price
    assert all(a.regret >= -gap * (1 + 1e-9) for a in options)


def test_a_larger_plan_keeps_the_options() -> None:
    plan = solve(TABLE, "4bpw", pins=["blocks.0=uint2-g64+ldl"])
    richer = larger_plan(TABLE, plan, extra_bytes=6000)
    assert richer.pins == plan.pins and richer.budget_bytes == plan.budget_bytes + 6000
    assert richer.choices[0].format == "uint2-g64+ldl" and richer.predicted_loss < plan.predicted_loss


@pytest.mark.parametrize(("matrix", "message"), [("nothing", "matches no matrix"), ("(", "not a regular expression")])
def test_a_regex_that_matches_nothing_is_refused(matrix: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        alternatives(TABLE, solve(TABLE, "4bpw"), matrix)


def test_another_table_is_refused() -> None:
    other = TABLE.model_copy(update={"model_sha256": "2" * 64})
    with pytest.raises(PlanError, match="another measured table"):
        larger_plan(other, solve(TABLE, "4bpw"))
