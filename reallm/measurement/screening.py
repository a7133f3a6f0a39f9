"""Bounds: candidates that cannot matter at the budgets asked need not be measured.

After every matrix was measured in one anchor format a, the cost of another format f is predicted from the errors e that
both make on a normal source (rotated weights look normal; elsewhere the prediction is too low, which only keeps more):

    cost(f) ~ cost(a) e(f) / e(a)

With the prices lambda (loss a byte) that the predicted programme has at the ends of the asked range of budgets, f is
measured unless at every price between, another format of the matrix is cheaper by more than TOLERANCE on both:

    cost(f) / t + lambda bytes(f)  >  min_g  t cost(g) + lambda bytes(g)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reallm.codecs.trellis.encode import error_table
from reallm.kernels.formats.codecs import AdditiveCodec, KMeansCodec, ScalarCodec, TrellisCodec
from reallm.kernels.formats.formats import Format
from reallm.models.loaded import Matrix
from reallm.planner.tables.measured_table import Kind

TOLERANCE = 1.5
"""By which factor a predicted cost may be wrong; on SmolLM2-135M trellis formats were within it (docs/log.md)."""
PRICES = 24
LLOYD_MAX_ERROR = {2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499, 6: 0.000644, 8: 0.0000415}
"""Max 1960: the least a scalar code can do."""
VECTOR_ERROR = 1.3
"""A codebook's error at b bits a weight is at least this times 4^-b (two bits: .081; E8P has .093)."""

Array = NDArray[np.float64]


def normal_error(fmt: Format) -> float | None:
    """Relative squared error of `fmt` on a normal source, or less; None where outliers or a low-rank term may help."""
    codec = fmt.codec
    if fmt.sparse or fmt.low_rank:
        return None
    if isinstance(codec, TrellisCodec):
        widths, errors = zip(*sorted(error_table(codec.state_bits).items()), strict=True)
        return float(np.exp(np.interp(codec.eighths / 4, widths, np.log(errors))))
    if isinstance(codec, ScalarCodec | KMeansCodec):
        return LLOYD_MAX_ERROR[codec.bits]
    if isinstance(codec, AdditiveCodec):
        return float(VECTOR_ERROR * 4 ** -(codec.num_codebooks * codec.codebook_bits / codec.dim))
    return None


@dataclass(frozen=True)
class Anchored:
    """One matrix: its measured cost in the anchor format."""

    matrix: Matrix
    cost: float


def anchor_of(formats: Sequence[Format]) -> Format | None:
    """The format to measure first: of those with a known error, rotated before others, the one nearest three bits."""
    known = [fmt for fmt in formats if normal_error(fmt) is not None]
    return min(known, key=lambda f: (not f.rotated, abs(np.log(normal_error(f) or 1) - np.log(4.0**-3))), default=None)


def worth_measuring(
    anchored: Sequence[Anchored], formats: Mapping[Kind, Sequence[Format]], budgets: tuple[float, float]
) -> dict[str, list[Format]]:
    """Matrix name -> formats that may matter for budgets of `budgets` bytes (least, most) for all these matrices."""
    tables = {a.matrix.name: _predicted(a, formats[a.matrix.kind]) for a in anchored}
    price = [_price(list(tables.values()), budget) for budget in budgets]
    prices = np.geomspace(min(price) / TOLERANCE, max(price) * TOLERANCE, PRICES)
    result = {}
    for a in anchored:
        costs, nbytes = tables[a.matrix.name]
        known = np.isfinite(costs)
        least = np.min(TOLERANCE * costs[known, None] + nbytes[known, None] * prices, axis=0)
        useful = (costs[:, None] / TOLERANCE + nbytes[:, None] * prices <= least).any(axis=1)
        keep = zip(formats[a.matrix.kind], useful | ~known, strict=True)
        result[a.matrix.name] = [fmt for fmt, kept in keep if kept]
    return result


def _predicted(anchored: Anchored, formats: Sequence[Format]) -> tuple[Array, Array]:
    """(costs, bytes) of `formats`; NaN where nothing is known."""
    matrix, anchor = anchored.matrix, anchor_of(formats)
    scale = anchored.cost / (normal_error(anchor) or 1.0) if anchor else np.nan
    errors = [normal_error(fmt) for fmt in formats]
    costs = np.array([np.nan if e is None else scale * e for e in errors])
    return costs, np.array([fmt.nbytes(matrix.rows, matrix.cols) for fmt in formats], dtype=float)


def _price(tables: list[tuple[Array, Array]], budget: float) -> float:
    """The price at which every matrix's cheapest format together take about `budget` bytes, by bisection."""
    low, high = 1e-18, 1e3
    for _ in range(100):
        middle = float(np.sqrt(low * high))
        used = sum(float(nbytes[np.nanargmin(costs + middle * nbytes)]) for costs, nbytes in tables)
        low, high = (low, middle) if used <= budget else (middle, high)
    return high
