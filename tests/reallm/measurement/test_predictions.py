"""Costs are predicted from other formats, and as well as the deviation says."""

from __future__ import annotations

import numpy as np
import pytest
from costs import RATES, make_matrix, record, true_costs

from reallm.kernels.formats.formats import Format
from reallm.measurement.predictions import LEAST_DEVIATION, predict
from reallm.models.matrix import Matrix
from reallm.planner.tables.measured_table import MeasurementRecord


def measured(matrices: list[Matrix], costs: dict[tuple[str, str], float], sampled: int) -> list[MeasurementRecord]:
    """The first `sampled` matrices in every format, the others in the middle one."""
    return [
        record(m, fmt, costs[m.name, fmt.name])
        for i, m in enumerate(matrices)
        for fmt in (RATES if i < sampled else RATES[2:3])
    ]


def test_exact_ratios_are_predicted_exactly() -> None:
    matrices = [make_matrix(i) for i in range(10)]
    costs = true_costs(matrices, noise=0.0)
    found = predict(matrices, {m.name: RATES for m in matrices}, measured(matrices, costs, sampled=2))
    assert len(found) == 8 * 4
    for prediction in found:
        cost = costs[prediction.matrix, prediction.format]
        values = (prediction.guided, prediction.two_sided, prediction.fisher, prediction.relative)
        assert values == pytest.approx((cost, 2 * cost, 3 * cost, cost / 2))
        assert prediction.deviation == LEAST_DEVIATION
        assert prediction.nbytes == Format.parse(prediction.format).nbytes(64, 64)


@pytest.mark.parametrize("noise", [0.03, 0.1])
def test_the_deviation_is_the_spread_of_the_errors(noise: float) -> None:
    matrices = [make_matrix(i) for i in range(400)]
    costs = true_costs(matrices, noise)
    found = predict(matrices, {m.name: RATES for m in matrices}, measured(matrices, costs, sampled=100))
    errors = [np.log(p.two_sided / (2 * costs[p.matrix, p.format])) for p in found]
    assert float(np.std(errors)) == pytest.approx(np.sqrt(2) * noise, rel=0.1)
    assert float(np.mean([p.deviation for p in found])) == pytest.approx(np.sqrt(2) * noise, rel=0.15)


def test_nothing_is_predicted_without_a_measurement_to_go_by() -> None:
    matrices = [make_matrix(0), make_matrix(1), make_matrix(2, "embedding")]
    formats = {m.name: RATES for m in matrices}
    costs = true_costs(matrices, 0.0)
    records = [record(matrices[0], fmt, costs[matrices[0].name, fmt.name]) for fmt in RATES[:2]]
    records.append(record(matrices[1], RATES[0], costs[matrices[1].name, RATES[0].name]))
    assert [(p.matrix, p.format) for p in predict(matrices, formats, records)] == [(matrices[1].name, RATES[1].name)]


def test_a_cost_of_zero_predicts_nothing() -> None:
    matrices = [make_matrix(0), make_matrix(1)]
    records = [record(matrices[0], fmt, 1.0) for fmt in RATES] + [record(matrices[1], RATES[0], 0.0)]
    assert predict(matrices, {m.name: RATES for m in matrices}, records) == []
