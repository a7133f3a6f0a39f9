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
        assert set(prediction.deviations.values()) == {LEAST_DEVIATION}
        assert prediction.nbytes == Format.parse(prediction.format).nbytes(64, 64)


@pytest.mark.parametrize("noise", [0.03, 0.1])
def test_the_deviation_is_the_spread_of_the_errors(noise: float) -> None:
    matrices = [make_matrix(i) for i in range(400)]
    costs = true_costs(matrices, noise)
    found = predict(matrices, {m.name: RATES for m in matrices}, measured(matrices, costs, sampled=100))
    errors = [np.log(p.two_sided / (2 * costs[p.matrix, p.format])) for p in found]
    assert float(np.std(errors)) == pytest.approx(np.sqrt(2) * noise, rel=0.1)
    assert float(np.mean([p.deviations["two_sided"] for p in found])) == pytest.approx(np.sqrt(2) * noise, rel=0.15)


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


def test_a_family_has_steps_and_deviations_of_its_own() -> None:
    matrices = [make_matrix(i, family=("steady", "erratic")[i % 2]) for i in range(400)]
    steady, erratic = true_costs(matrices, 0.02), true_costs(matrices, 0.2)
    costs = {
        (m.name, fmt.name): (steady if m.family == "steady" else erratic)[m.name, fmt.name]
        * (1.3 if (m.family, fmt) == ("steady", RATES[4]) else 1.0)
        for m in matrices
        for fmt in RATES
    }
    found = predict(matrices, {m.name: RATES for m in matrices}, measured(matrices, costs, sampled=100))
    families = {m.name: m.family for m in matrices}
    for family, noise in (("steady", 0.02), ("erratic", 0.2)):
        mine = [p for p in found if families[p.matrix] == family]
        errors = [np.log(p.two_sided / (2 * costs[p.matrix, p.format])) for p in mine]
        assert abs(float(np.mean(errors))) < np.sqrt(2) * noise / 3
        stated = float(np.mean([p.deviations["two_sided"] for p in mine]))
        assert float(np.std(errors)) / 1.3 < stated < 2.2 * float(np.std(errors))


def test_an_erratic_codec_does_not_borrow_the_deviation_of_a_steady_one() -> None:
    matrices, integer = [make_matrix(i) for i in range(30)], Format.parse("int8-g16")
    formats = (*RATES, integer)
    costs, random = true_costs(matrices, 0.01), np.random.default_rng(1)
    costs |= {(m.name, integer.name): costs[m.name, RATES[0].name] * np.exp(random.normal(0, 0.6)) for m in matrices}
    records = measured(matrices, costs, sampled=6)
    records += [record(m, integer, costs[m.name, integer.name]) for m in matrices[:6]]
    found = predict(matrices, {m.name: formats for m in matrices}, records)
    assert len(found) == 24 * 5
    for prediction in found:
        deviation = prediction.deviations["two_sided"]
        assert deviation > 0.4 if prediction.format == integer.name else deviation < 0.1
