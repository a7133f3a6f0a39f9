"""Budgets: what is parsed, what is refused, and the smallest budget that is enough."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reallm.planner.tables.budget import UNIT_BYTES, parse_budget
from reallm.planner.tables.units import PlanError


@pytest.mark.parametrize(
    ("text", "scope", "nbytes"),
    [
        ("3.0bpw", "matrices", 375),
        (" 3 BPW ", "matrices", 375),
        ("2.4999bpw", "matrices", 312),
        ("17bpw", "matrices", 2125),
        ("32bpw", "matrices", 4000),
        (".5bpw", "matrices", 62),
        ("48MiB", "file", 48 << 20),
        ("48mib", "file", 48 << 20),
        ("0.5 GiB", "file", 1 << 29),
        ("4GB", "file", 4 * 10**9),
        ("500MB", "file", 500 * 10**6),
        ("1.5KiB", "file", 1536),
        ("50331648B", "file", 50331648),
    ],
)
def test_budgets_are_parsed_exactly(text: str, scope: str, nbytes: int) -> None:
    budget = parse_budget(text)
    assert (budget.scope, budget.nbytes(1000)) == (scope, nbytes)
    assert budget.text == text.strip()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", "is zero"),
        ("0bpw", "is zero"),
        ("0.0MiB", "is zero"),
        ("3 bananas", "expected a number with a unit"),
        ("3", "expected a number with a unit"),
        ("", "expected a number with a unit"),
        ("bpw", "expected a number with a unit"),
        ("-1MiB", "expected a number with a unit"),
        ("1e3MiB", "expected a number with a unit"),
        ("nanbpw", "expected a number with a unit"),
        ("٣bpw", "expected a number with a unit"),
        ("3.0bpw 4", "expected a number with a unit"),
        ("40bpw", "more than 0 and at most 32bpw"),
        ("32.01bpw", "more than 0 and at most 32bpw"),
        ("0.5B", "less than one byte"),
    ],
)
def test_invalid_budgets_are_refused_in_one_line(text: str, expected: str) -> None:
    with pytest.raises(PlanError, match=expected) as caught:
        parse_budget(text)
    assert repr(text) in str(caught.value) and "\n" not in str(caught.value)


@given(st.sampled_from(["bpw", *UNIT_BYTES]), st.integers(1, 10**12), st.integers(1, 10**12))
def test_the_smallest_budget_is_enough_and_hardly_larger(unit: str, nbytes: int, numel: int) -> None:
    budget = parse_budget(f"1{unit}")
    text = budget.smallest_text(nbytes, numel)
    amount = Fraction(text.removesuffix(unit))
    per_unit = Fraction(numel, 8) if unit == "bpw" else Fraction(UNIT_BYTES[unit])
    assert int(amount * per_unit) >= nbytes
    assert int((amount - Fraction(1, 10_000)) * per_unit) < nbytes
