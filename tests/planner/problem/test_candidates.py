"""Pins, exclusions, formats and ties: what they do, and a one-line error for each mistake."""

from __future__ import annotations

from typing import Unpack

import pytest
from strategies import make_table

from reallm.kernels.formats.formats import Format
from reallm.planner.problem.plan_options import PlanKeywords
from reallm.planner.results.allocate import solve
from reallm.planner.tables.measured_table import MeasuredTable
from reallm.planner.tables.units import PlanError

LADDER = {"int2-g8": 8.0, "nf3-g16": 2.0, "int4-g8": 0.5}


@pytest.fixture
def table() -> MeasuredTable:
    return make_table(
        ("l.0.q", 16, 64, "linear", LADDER),
        ("l.0.k", 16, 64, "linear", {name: cost / 4 for name, cost in LADDER.items() if name != "nf3-g16"}),
        ("l.10.q", 16, 64, "linear", LADDER),
        ("embed", 32, 16, "embedding", {"int4-g8": 0.25, "aq1x4-d4-shared": 0.5}),
        ("lm_head", 32, 16, "head", {"int4-g8": 0.25}),
    )


def chosen(table: MeasuredTable, budget: str, **options: Unpack[PlanKeywords]) -> dict[str, str]:
    """Matrix -> format of the plan with these options."""
    return {c.matrix: c.format for c in solve(table, budget, **options).choices}


def test_a_pin_holds_at_any_cost(table: MeasuredTable) -> None:
    assert chosen(table, "32bpw", pins=[r"\.0\.q=INT2-g8"]) == {"l.0.k": "bf16", "l.0.q": "int2-g8", "l.10.q": "bf16"}


def test_a_pin_brings_the_head_into_a_bpw_budget(table: MeasuredTable) -> None:
    plan = solve(table, "32bpw", pins=["lm_head=int4-g8"])
    assert "lm_head" in {c.matrix for c in plan.choices} and plan.dense == ("embed",)
    assert plan.budget_bytes == 4 * (3 * 1024 + 512)


def test_the_dense_format_can_be_pinned(table: MeasuredTable) -> None:
    assert chosen(table, "8bpw", pins=["l.0.q=bf16"])["l.0.q"] == "bf16"


def test_excluded_matrices_take_no_part(table: MeasuredTable) -> None:
    plan = solve(table, "6bpw", exclude=[r"^l\.0\."])
    assert [c.matrix for c in plan.choices] == ["l.10.q"] and plan.dense == ("embed", "l.0.k", "l.0.q", "lm_head")
    assert plan.budget_bytes == 768
    assert any("--exclude" in note for note in plan.notes)


def test_formats_restrict_the_candidates(table: MeasuredTable) -> None:
    assert set(chosen(table, "32bpw", formats=["int2-*", "nf3-g16"]).values()) <= {"int2-g8", "nf3-g16"}
    plan = solve(table, "1MiB", formats=["int4-g8", "BF16"])
    assert {c.format for c in plan.choices} == {"bf16"}
    alone = solve(table, "1MiB", formats=["aq1x4*"])
    assert {c.matrix: c.format for c in alone.choices} == {
        **dict.fromkeys(["l.0.q", "l.0.k", "l.10.q", "lm_head"], "bf16"),
        "embed": "aq1x4-d4-shared",
    }
    assert any("4 matrices have no measured candidate" in note for note in alone.notes)


def test_ties_make_matrices_agree(table: MeasuredTable) -> None:
    inputs = chosen(table, "5bpw", ties="inputs")
    assert inputs["l.0.q"] == inputs["l.0.k"] != "nf3-g16"
    family = chosen(table, "5bpw", ties="family")
    assert family["l.0.q"] == family["l.10.q"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"pins": ["lm_haed=int4-g8"]}, "matches none of the 5 matrices, such as l.0.q"),
        ({"pins": ["lm_head"]}, "expected 'regex=format'"),
        ({"pins": ["=int4-g8"]}, "expected 'regex=format'"),
        ({"pins": ["lm_head="]}, "expected 'regex=format'"),
        ({"pins": ["lm_(head=int4-g8"]}, "is not a regular expression"),
        ({"pins": ["lm_head=int9"]}, "unknown format 'int9'"),
        ({"pins": ["lm_head=nf3-g16"]}, "lm_head was not measured in nf3-g16; expected one of bf16, int4-g8"),
        ({"pins": ["l.0=int2-g8", "q=int4-g8"]}, "contradict each other over l.0.q"),
        ({"pins": ["l.0.q=int2-g8"], "exclude": ["l.0"]}, "both pinned and excluded"),
        ({"pins": ["l.0.q=nf3-g16"], "ties": "inputs"}, "no format in common"),
        ({"exclude": ["nothing"]}, "--exclude 'nothing' matches none"),
        ({"exclude": ["l."]}, "no matrix takes part"),
        ({"formats": ["int8-g0"]}, "--format 'int8-g0' was not measured; expected one of aq1x4-d4-shared, bf16"),
        ({"formats": ["int8*"]}, "--format 'int8\\*' was not measured"),
        ({"formats": ["int8"]}, "unknown format"),
    ],
)
def test_each_mistake_has_a_one_line_error(table: MeasuredTable, options: PlanKeywords, expected: str) -> None:
    with pytest.raises(PlanError, match=expected) as caught:
        chosen(table, "8bpw", **options)
    assert "\n" not in str(caught.value)


def test_a_table_that_contradicts_itself_is_refused(table: MeasuredTable) -> None:
    first = table.measurements[0]
    book = next(r for r in table.measurements if r.format.endswith("shared"))
    wrong = {
        "no such matrix": {"measurements": (first.model_copy(update={"matrix": "ghost"}),)},
        "was measured twice": {"measurements": (first, first)},
        "this version stores": {"measurements": (first.model_copy(update={"nbytes": first.nbytes + 64}),)},
        "unknown format": {"measurements": (first.model_copy(update={"format": "int4"}),)},
        "shared codebook 'aq1x4-d4-shared@embed' is missing": {"measurements": (book,), "shared": ()},
        "source bytes": {"matrices": (table.matrices[0].model_copy(update={"source_bytes": 5}), *table.matrices[1:])},
    }
    for expected, change in wrong.items():
        with pytest.raises(PlanError, match=expected):
            solve(table.model_copy(update=change), "8MiB")


@pytest.mark.parametrize(("count", "neural"), [(6, False), (7, True)])
def test_a_neural_decoder_is_charged_once_for_a_family(count: int, neural: bool) -> None:
    """The decoder pays off for seven matrices, not for six; the budget is exactly what the smaller way takes."""
    name, other = "nd1x4-d2-c32x4-t2-w8", "int4-g8"
    fmt = Format.parse(name)
    assert fmt.shared_field is not None
    codes, codebook, plain = fmt.nbytes(24, 48), fmt.shared_field.nbytes, Format.parse(other).nbytes(24, 48)
    rows = ((f"l.{i}.q", 24, 48, "linear", {name: 1.0, other: 0.5}) for i in range(count))
    shared, alone = count * codes + codebook, count * plain
    assert (shared < alone) == neural
    numel = count * 24 * 48
    plan = solve(make_table(*rows), f"{(min(shared, alone) + 0.5) * 8 / numel:.6f}bpw")
    assert {choice.format for choice in plan.choices} == {name if neural else other}
    assert plan.shared == ({f"{name}@q": codebook} if neural else {})
    assert plan.matrices_bytes == min(shared, alone)
