"""Screening leaves out what cannot matter, and never what a plan within the tolerance would choose."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reallm.kernels.formats.formats import Format
from reallm.measurement.screening import (
    TOLERANCE,
    AnchorCost,
    choose_anchor,
    normal_error,
    worth_measuring,
)
from reallm.models.matrix import Matrix

RATES = [f"tq{rate:g}-l10+ldl2+rot" for rate in np.arange(1.5, 5.25, 0.5)]
FORMATS = tuple(Format.parse(name) for name in (*RATES, "lm2-g64+ldl", "lm3-g64+ldl", "aq1x8-d4", "lm4-g64+o5"))


def matrix(number: int, rows: int = 64, cols: int = 64) -> Matrix:
    name = f"blocks.{number}.q"
    return Matrix(
        **{"name": name, "parameter": f"{name}.weight", "rows": rows, "cols": cols, "kind": "linear", "block": number},
        **{
            "input": name,
            "family": "q",
            "transposed": False,
            "expert": None,
            "tied": (),
            "source_bytes": 2 * rows * cols,
        },
    )


def test_errors_fall_with_the_bits_and_unknown_ones_are_none() -> None:
    errors = [normal_error(Format.parse(name)) for name in RATES]
    assert all(e is not None for e in errors) and errors == sorted(errors, reverse=True)
    assert normal_error(Format.parse("lm4-g64+o5")) is None and normal_error(Format.parse("int4-g64+r8")) is None
    assert choose_anchor(FORMATS) == Format.parse("tq3-l10+ldl2+rot")
    assert choose_anchor([Format.parse("bf16")]) is None


@given(st.lists(st.floats(1e-4, 1.0), min_size=2, max_size=6), st.floats(1.6, 4.4), st.integers(0, 999))
@settings(deadline=None)
def test_what_the_best_plan_takes_is_measured(costs: list[float], bits: float, seed: int) -> None:
    """With true costs within the tolerance of the predicted ones, the cheapest format at the price stays."""
    anchored = [AnchorCost(matrix(i), cost) for i, cost in enumerate(costs)]
    budget = bits * 64 * 64 * len(costs) / 8
    kept = worth_measuring(anchored, {"linear": FORMATS}, (budget, budget))
    known = [fmt for fmt in FORMATS if normal_error(fmt) is not None]
    errors = np.array([normal_error(fmt) for fmt in known]) / normal_error(Format.parse("tq3-l10+ldl2+rot"))
    predicted = np.array(costs)[:, None] * errors
    noise = np.random.default_rng(seed).uniform(1 / TOLERANCE, TOLERANCE, predicted.shape)
    nbytes = np.array([fmt.nbytes(64, 64) for fmt in known])
    low, high = 1e-12, 1e3  # the price of the predicted problem, computed independently here
    for _ in range(200):
        middle = (low * high) ** 0.5
        used = nbytes[(predicted + middle * nbytes).argmin(1)].sum()
        low, high = (low, middle) if used <= budget else (middle, high)
    for a, cheapest in zip(anchored, (predicted * noise**0.999 + high * nbytes).argmin(1), strict=True):
        assert known[cheapest] in kept[a.matrix.name]
        assert Format.parse("lm4-g64+o5") in kept[a.matrix.name]  # its error is unknown


def test_candidates_far_from_the_budget_are_left_out() -> None:
    anchored = [AnchorCost(matrix(i), 0.01) for i in range(4)]
    budget = 2.0 * 4 * 64 * 64 / 8
    kept = worth_measuring(anchored, {"linear": FORMATS}, (budget, budget))
    assert all(Format.parse("tq5-l10+ldl2+rot") not in formats for formats in kept.values())
    assert all(2 <= len(formats) <= len(FORMATS) // 2 for formats in kept.values())


@pytest.mark.parametrize("name", ["aq1x8-d4", "km3", "lm3-g64"])
def test_bounds_of_other_codecs_are_not_too_high(name: str) -> None:
    rate = {"aq1x8-d4": 2, "km3": 3, "lm3-g64": 3}[name]
    assert 4.0**-rate < (normal_error(Format.parse(name)) or 0) < 2.5 * 4.0**-rate
