"""PlanOptions: its keywords are its fields, keywords win, and a plan gives its options back."""

from __future__ import annotations

from dataclasses import fields

import pytest
from strategies import make_table

from reallm.planner.problem.plan_options import PlanKeywords, PlanOptions, merged_options
from reallm.planner.problem.selection import select
from reallm.planner.results.allocate import solve
from reallm.planner.tables.requirements import Requirements

TABLE = make_table(("l.0.q", 16, 64, "linear", {"int2-g8": 8.0, "int4-g8": 0.5}))


def test_the_keywords_are_the_fields() -> None:
    assert list(PlanKeywords.__annotations__) == [field.name for field in fields(PlanOptions)]


def test_keywords_replace_fields_and_sequences_become_tuples() -> None:
    options = PlanOptions(pins=("q=int2-g8",), ties="family")
    assert merged_options(options, {}) == options
    assert merged_options(None, {}) == PlanOptions()
    merged = merged_options(options, {"pins": [], "formats": ["int4-*"], "requirements": None})
    assert merged == PlanOptions(ties="family", formats=("int4-*",), requirements=Requirements())


def test_a_plan_gives_its_options_back() -> None:
    options = PlanOptions(
        pins=("q=int2-g8",),
        cost="guided",
        ties="inputs",
        requirements=Requirements(max_formats=1),
        corrections={"q": 2.0},
    )
    assert PlanOptions.of(solve(TABLE, "6bpw", options)) == options


@pytest.mark.parametrize("options", [PlanOptions(preset="gptq"), PlanOptions(target="cpu")], ids=["preset", "target"])
def test_the_planner_refuses_what_it_would_ignore(options: PlanOptions) -> None:
    with pytest.raises(ValueError, match="preset and target"):
        select(TABLE, "matrices", options)
