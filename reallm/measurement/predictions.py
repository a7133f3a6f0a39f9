"""Predicting the cost of a matrix in one format from its cost in another one.

Formats lose in nearly the same proportion on every matrix. The logarithm of the cost of matrix m in format f is

    log cost(m, f) = size(m) + offset(f) + residual(m, f)

The offsets are fitted by least squares to everything measured so far, for each kind of matrix and each of the four
costs. A cost that was not measured is predicted from a measured format of the same matrix: the one from which the step
deviates least among the matrices that were measured in both. Mean and deviation of a step are those of the matrix's
family, drawn towards those of all matrices where few of the family were measured (docs/explanation/cost.md).
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
"""What is seen on n matrices of a family is mixed with what is seen on all of them, which counts as this many, and that
with what is seen of all formats of the codec."""
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

    logs: Array
    """Logarithms of the measured costs, [matrices, formats]; NaN where a matrix was not measured or costs nothing."""
    families: NDArray[np.int64]
    """The number of each matrix's family, [matrices]."""
    codecs: Sequence[type]
    """The codec of each format."""
    offsets: Array = field(init=False)
    """[formats]; NaN for a format in which no matrix was measured."""
    spreads: Mapping[type, float] = field(init=False)
    """Codec -> standard deviation of the difference of two residuals of a matrix in formats of this codec."""

    def __post_init__(self) -> None:
        known = ~np.isnan(self.logs)
        counted = known & (known.sum(axis=1, keepdims=True) > 1)  # a matrix with one measurement says nothing
        logs = np.where(counted, self.logs, 0.0)
        offsets, per_row, per_column = np.zeros(self.logs.shape[1]), counted.sum(axis=1), counted.sum(axis=0)
        sizes = np.zeros(len(self.logs))
        for _ in range(ROUNDS):
            sizes = (logs - counted * offsets).sum(axis=1) / np.maximum(per_row, 1)
            offsets = (logs - counted * sizes[:, None]).sum(axis=0) / np.maximum(per_column, 1)
        self.offsets = np.where(per_column > 0, offsets, np.nan)
        residuals = np.where(counted, logs - sizes[:, None] - offsets, np.nan)
        self.spreads = {codec: self._spread(residuals, codec) for codec in {*self.codecs}}
        self._steps: dict[tuple[int, int, int], tuple[float, float]] = {}

    def _spread(self, residuals: Array, codec: type) -> float:
        """The spread of `codec`, from the `residuals` [matrices, formats] of the fit."""
        mine = residuals[:, [each is codec for each in self.codecs]]
        mine = mine[(~np.isnan(mine)).sum(axis=1) > 1]
        if not len(mine):
            return LEAST_DEVIATION
        known = ~np.isnan(mine)
        centred = np.where(known, mine - np.nanmean(mine, axis=1, keepdims=True), 0.0)
        free = max(int(known.sum()) - len(mine) - int(known.any(axis=0).sum()) + 1, 1)
        return max(float(np.sqrt(2 * np.square(centred).sum() / free)), LEAST_DEVIATION)

    def predict(self, row: int, column: int) -> tuple[float, float] | None:
        """(logarithm of the cost, its standard deviation) of a matrix in a format; None without anything to go by."""
        if np.isnan(self.offsets[column]):
            return None
        usable = np.flatnonzero(~np.isnan(self.logs[row]) & ~np.isnan(self.offsets))
        if not len(usable):
            return None
        steps = [(*self._step(source, column, int(self.families[row])), source) for source in usable.tolist()]
        step, deviation, source = min(steps, key=lambda found: found[1])
        return float(self.logs[row, source] + step), deviation

    def _step(self, source: int, column: int, family: int) -> tuple[float, float]:
        """(mean, standard deviation) of the difference between two formats in a family of matrices."""
        key = (source, column, family)
        if key not in self._steps:
            step = self.offsets[column] - self.offsets[source]
            residuals = self.logs[:, column] - self.logs[:, source] - step
            seen = ~np.isnan(residuals)
            if self.codecs[source] is self.codecs[column]:
                prior = self.spreads[self.codecs[column]] ** 2
            else:  # nothing else shows how far codecs differ: the variance of a new value after `count` normal ones
                count = int(seen.sum())
                prior = float(np.square(residuals[seen]).sum()) * (1 + 1 / max(count, 1)) / max(count - 3, 0.5)
            everywhere = _mixed(residuals[seen], prior)
            own = residuals[seen & (self.families == family)]
            shift = float(own.sum() / (len(own) + PRIOR_PAIRS))
            deviation = float(np.sqrt(_mixed(own - shift, everywhere)))
            self._steps[key] = float(step + shift), max(deviation, LEAST_DEVIATION)
        return self._steps[key]


def _mixed(residuals: Array, prior: float) -> float:
    """The mean square of `residuals` mixed with the variance `prior`, which counts as PRIOR_PAIRS of them."""
    return float((np.square(residuals).sum() + PRIOR_PAIRS * prior) / (len(residuals) + PRIOR_PAIRS))


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
    known = {f.name: f for m in members for f in formats[m.name]}
    names = {name: i for i, name in enumerate(sorted(known))}
    codecs = [type(known[name].codec) for name in names]
    families = np.unique([matrix.family for matrix in members], return_inverse=True)[1]
    curves = {cost: Curve(_logs(members, names, records, cost), families, codecs) for cost in COSTS}
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
                        deviations={cost: deviation for cost, (_, deviation) in values.items()},
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
