"""Tables of scalar codecs: shape, order, and the defining property of each."""

from __future__ import annotations

from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest

from reallm.kernels.codes.tables import table
from reallm.kernels.formats.codecs import SCALAR_BITS


@pytest.mark.parametrize("bits", SCALAR_BITS)
@pytest.mark.parametrize("name", ["int", "nf", "lm"])
def test_levels_increase_and_reach_one(name: str, bits: int) -> None:
    levels = table(name, bits)
    assert levels.shape == (2**bits,) and levels.dtype == np.float32
    assert (np.diff(levels) > 0).all()
    assert np.abs(levels).max() == 1.0
    with pytest.raises(ValueError, match="read-only"):
        levels[0] = 0.0


@pytest.mark.parametrize("bits", SCALAR_BITS)
def test_int_and_nf_hold_an_exact_zero(bits: int) -> None:
    assert 0.0 in table("int", bits) and 0.0 in table("nf", bits)


@pytest.mark.parametrize(("bits", "top", "error"), [(2, 1.5104, 0.1175), (3, 2.1520, 0.03454), (4, 2.7326, 0.009497)])
def test_lloyd_max_reaches_the_published_errors(bits: int, top: float, error: float) -> None:
    """Max 1960, table I: outermost level and mean squared error for 4, 8 and 16 levels."""
    normal = NormalDist()
    levels = [float(v) * top for v in table("lm", bits)]
    edges = [-np.inf, *((a + b) / 2 for a, b in pairwise(levels)), np.inf]

    def moments(a: float, b: float) -> tuple[float, float, float]:
        fa, fb = (0.0 if np.isinf(x) else normal.pdf(x) for x in (a, b))
        mass = (1.0 if b == np.inf else normal.cdf(b)) - (0.0 if a == -np.inf else normal.cdf(a))
        edge = (0.0 if np.isinf(a) else a * fa) - (0.0 if np.isinf(b) else b * fb)
        return mass, fa - fb, mass + edge

    cells = [moments(a, b) for a, b in pairwise(edges)]
    mse = sum(m2 - 2 * v * m1 + v * v * m0 for v, (m0, m1, m2) in zip(levels, cells, strict=True))
    assert mse == pytest.approx(error, rel=1e-3)  # four printed digits
