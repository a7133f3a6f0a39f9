"""Predicting the cost of a matrix in one format from its cost in another one.

Formats lose in nearly the same proportion on every matrix. The logarithm of the cost of matrix m in format f is

    log cost(m, f) = size(m) + offset(f) + residual(m, f)

The offsets are fitted by least squares to everything measured so far, for each kind of matrix and each of the four
costs. A cost that was not measured is predicted from the measured format of the same matrix whose offset is nearest,
and the deviation of the prediction is that of the same step on the matrices that were measured in both formats.
On SmolLM2-135M the deviation between trellis formats is 0.02 to 0.09 (docs/explanation/cost.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from reallm.kernels.formats.formats import Format
from reallm.models.matrix import Matrix
from reallm.planner.tables.measured_table import MeasurementRecord, PredictionRecord
from reallm.planner.tables.plan import Cost

COSTS: tuple[Cost, ...] = get_args(Cost)
PRIOR_PAIRS = 4
"""A deviation seen on n matrices is mixed with the deviation of all formats, which counts as this many matrices."""
LEAST_DEVIATION = 0.01
ROUNDS = 30
"""Rounds of alternating least squares; offsets then change by less than 1e-6."""

Array = NDArray[np.float64]


def kind_group(matrix: Matrix) -> str:
    """Matrices of one group share offsets: linear layers and experts, or embedding and head."""
    return "inner" if matrix.kind in ("linear", "expert") else "vocabulary"


@dataclass
class Curve:
    """The offsets of one cost in one group of matrices, fitted to `logs`."""

    formats: Mapping[str, int]
    logs: Array
    """Logarithms of the measured costs, [matrices, formats]; NaN where a matrix was not measured or costs nothing."""
    offsets: Array = field(init=False)
    """[formats]; NaN for a format in which no matrix was measured."""
    spread: float = field(init=False)
    """Standard deviation of the difference of two residuals of a matrix."""

    def __post_init__(self) -> None:
        known = ~np.isnan(self.logs)
        counted = known & (known.sum(axis=1, keepdims=True) > 1)  # a matrix with one measurement says nothing
        logs = np.where(counted, self.logs, 0.0)
        offsets, per_row, per_column = np.zeros(self.logs.shape[1]), counted.sum(axis=1), counted.sum(axis=0)
        sizes = np.zeros(len(self.logs))
        for _ in range(ROUNDS):
            sizes = (logs - counted * offsets).sum(axis=1) / np.maximum(per_row, 1)
            offsets = (logs - counted * sizes[:, None]).sum(axis=0) / np.maximum(per_column, 1)
        residuals = (logs - sizes[:, None] - offsets)[counted]
        free = max(len(residuals) - int((per_row > 0).sum()) - int((per_column > 0).sum()) + 1, 1)
        self.offsets = np.where(per_column > 0, offsets, np.nan)
        self.spread = max(float(np.sqrt(2 * np.square(residuals).sum() / free)), LEAST_DEVIATION)

    def predict(self, row: int, column: int) -> tuple[float, float] | None:
        """(logarithm of the cost, its standard deviation) of a matrix in a format; None without anything to go by."""
        distance = np.abs(self.offsets - self.offsets[column])
        distance[np.isnan(self.logs[row])] = np.nan
        if np.isnan(distance).all():
            return None
        nearest = int(np.nanargmin(distance))
        step = self.offsets[column] - self.offsets[nearest]
        both = self.logs[:, column] - self.logs[:, nearest] - step
        both = both[~np.isnan(both)]
        total = np.square(both).sum() + PRIOR_PAIRS * self.spread**2
        deviation = max(float(np.sqrt(total / (len(both) + PRIOR_PAIRS))), LEAST_DEVIATION)
        return float(self.logs[row, nearest] + step), deviation


def predict(
    matrices: Sequence[Matrix], formats: Mapping[str, Sequence[Format]], measured: Iterable[MeasurementRecord]
) -> list[PredictionRecord]:
    """Predict the costs of `matrices` in those of their `formats` (by matrix name) in which they were not measured.

    A candidate is left out if nothing was measured from which it could be predicted.
    """
    records = {(record.matrix, record.format): record for record in measured}
    result: list[PredictionRecord] = []
    for group in sorted({kind_group(matrix) for matrix in matrices}):
        members = [matrix for matrix in matrices if kind_group(matrix) == group]
        result += _predict_group(members, formats, records)
    return result


def _predict_group(
    members: Sequence[Matrix],
    formats: Mapping[str, Sequence[Format]],
    records: Mapping[tuple[str, str], MeasurementRecord],
) -> list[PredictionRecord]:
    names = {name: i for i, name in enumerate(sorted({f.name for m in members for f in formats[m.name]}))}
    curves = {cost: Curve(names, _logs(members, names, records, cost)) for cost in COSTS}
    result = []
    for row, matrix in enumerate(members):
        for fmt in formats[matrix.name]:
            if (matrix.name, fmt.name) in records:
                continue
            found = {cost: curve.predict(row, names[fmt.name]) for cost, curve in curves.items()}
            values = {cost: value for cost, value in found.items() if value is not None}
            if len(values) == len(COSTS):
                result.append(
                    PredictionRecord(
                        matrix=matrix.name,
                        format=fmt.name,
                        nbytes=fmt.nbytes(matrix.rows, matrix.cols),
                        **{cost: float(np.exp(value)) for cost, (value, _) in values.items()},
                        deviation=max(deviation for _, deviation in values.values()),
                    )
                )
    return result


def _logs(
    members: Sequence[Matrix],
    names: Mapping[str, int],
    records: Mapping[tuple[str, str], MeasurementRecord],
    cost: Cost,
) -> Array:
    logs = np.full((len(members), len(names)), np.nan)
    for row, matrix in enumerate(members):
        for name, column in names.items():
            record = records.get((matrix.name, name))
            if record is not None and getattr(record, cost) > 0:
                logs[row, column] = np.log(getattr(record, cost))
    return logs
