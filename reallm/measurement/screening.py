"""Screening: candidates that no plan in the requested range of budgets would choose are not measured.

Every matrix is first measured in one format a, the anchor. The cost of any other format f is then predicted from the
errors e of both formats on normally distributed weights:

    cost(f) ~ cost(a) e(f) / e(a)

Rotated weights are close to normal; for others the prediction is too low, so that more candidates are kept than
necessary.

Let lambda be the price of a byte in loss. It runs between its values at the two ends of the range of budgets, found by
solving the planning problem with predicted costs. f is left out if, at every such price, another format g of the matrix
is cheaper even if both predictions are wrong by the factor t = TOLERANCE to the disadvantage of g:

    cost(f) / t + lambda bytes(f)  >  min_g  t cost(g) + lambda bytes(g)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reallm.codecs.trellis.encode import error_table
from reallm.kernels.formats.codecs import (
    AdditiveCodec,
    AnyCodec,
    DenseCodec,
    KMeansCodec,
    LatticeCodec,
    NeuralCodec,
    ScalarCodec,
    TrellisCodec,
)
from reallm.kernels.formats.formats import Format
from reallm.models.matrix import Matrix
from reallm.planner.tables.measured_table import Kind

TOLERANCE = 1.5
"""Factor by which predicted costs may be wrong. On SmolLM2-135M, predictions for trellis formats were within this
factor (docs/log.md)."""
PRICES = 24
"""Number of prices to try between the two ends of the range."""
LLOYD_MAX_ERROR = {2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499, 6: 0.000644, 8: 0.0000415}
"""The smallest possible relative squared error of a scalar code on a normal source, by bits (Max 1960)."""
VECTOR_ERROR = 1.3
"""A codebook of b bits per weight has at least this error times 4^-b: 0.081 at two bits, where E8P has 0.093."""

Array = NDArray[np.float64]


def _trellis_error(codec: TrellisCodec) -> float:
    widths, errors = zip(*sorted(error_table(codec.state_bits).items()), strict=True)
    return float(np.exp(np.interp(codec.eighths / 4, widths, np.log(errors))))


def _scalar_error(codec: ScalarCodec | KMeansCodec) -> float:
    return LLOYD_MAX_ERROR[codec.bits]


def _additive_error(codec: AdditiveCodec) -> float:
    return float(VECTOR_ERROR * 4 ** -(codec.num_codebooks * codec.codebook_bits / codec.dim))


NORMAL_ERRORS: Mapping[type[AnyCodec], Callable[[Any], float] | None] = {
    DenseCodec: None,
    ScalarCodec: _scalar_error,
    KMeansCodec: _scalar_error,
    AdditiveCodec: _additive_error,
    LatticeCodec: None,
    TrellisCodec: _trellis_error,
    NeuralCodec: None,
}
"""A lower bound of each codec's relative squared error on a normal source; None if no bound is known."""


def normal_error(fmt: Format) -> float | None:
    """A lower bound of the relative squared error of `fmt` on a normal source.

    None if no bound is known for its codec, or if outliers or a low-rank term may lower the error.
    """
    error = NORMAL_ERRORS[type(fmt.codec)]
    return None if fmt.sparse or fmt.low_rank or error is None else error(fmt.codec)


@dataclass(frozen=True)
class AnchorCost:
    """A matrix and its measured cost in the anchor format, in nats per token."""

    matrix: Matrix
    cost: float


def choose_anchor(formats: Sequence[Format]) -> Format | None:
    """Choose the anchor: prefer rotated formats, and among them the one whose error is nearest to that of three bits.

    Returns None if the error of no format is known.
    """
    known = [fmt for fmt in formats if normal_error(fmt) is not None]
    return min(known, key=lambda f: (not f.rotated, abs(np.log(normal_error(f) or 1) - np.log(4.0**-3))), default=None)


def worth_measuring(
    anchor_costs: Sequence[AnchorCost], formats: Mapping[Kind, Sequence[Format]], budgets: tuple[float, float]
) -> dict[str, list[Format]]:
    """Find the formats that have to be measured, by matrix name.

    `formats` holds the candidates for each kind of matrix, `budgets` the smallest and the largest total of bytes for
    the matrices of `anchor_costs`. Formats without a known error are always included.
    """
    predictions = {a.matrix.name: _predict(a, formats[a.matrix.kind]) for a in anchor_costs}
    ends = [_price_of_budget(list(predictions.values()), budget) for budget in budgets]
    prices = np.geomspace(min(ends) / TOLERANCE, max(ends) * TOLERANCE, PRICES)
    result = {}
    for a in anchor_costs:
        costs, nbytes = predictions[a.matrix.name]
        known = np.isfinite(costs)
        cheapest = np.min(TOLERANCE * costs[known, None] + nbytes[known, None] * prices, axis=0)
        useful = (costs[:, None] / TOLERANCE + nbytes[:, None] * prices <= cheapest).any(axis=1)
        keep = zip(formats[a.matrix.kind], useful | ~known, strict=True)
        result[a.matrix.name] = [fmt for fmt, kept in keep if kept]
    return result


def _predict(anchor_cost: AnchorCost, formats: Sequence[Format]) -> tuple[Array, Array]:
    """(predicted costs, bytes) of `formats`; the cost is NaN for a format without a known error."""
    matrix, anchor = anchor_cost.matrix, choose_anchor(formats)
    scale = anchor_cost.cost / (normal_error(anchor) or 1.0) if anchor else np.nan
    errors = [normal_error(fmt) for fmt in formats]
    costs = np.array([np.nan if e is None else scale * e for e in errors])
    return costs, np.array([fmt.nbytes(matrix.rows, matrix.cols) for fmt in formats], dtype=float)


def _price_of_budget(predictions: list[tuple[Array, Array]], budget: float) -> float:
    """The price per byte at which the cheapest formats of all matrices take about `budget` bytes, by bisection."""
    low, high = 1e-18, 1e3
    for _ in range(100):
        middle = float(np.sqrt(low * high))
        used = sum(float(nbytes[np.nanargmin(costs + middle * nbytes)]) for costs, nbytes in predictions)
        low, high = (low, middle) if used <= budget else (middle, high)
    return high
