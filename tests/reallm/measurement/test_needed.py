"""Only the candidates that the plan needs are encoded, and the plan is as good as with all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from costs import RATES, make_matrix, record, true_costs

from reallm.kernels.formats.formats import Format
from reallm.measurement.needed import NeededMeasurement, check_budget
from reallm.measurement.schedule import Measured
from reallm.models.matrix import Matrix
from reallm.planner.problem.plan_options import PlanOptions
from reallm.planner.results.allocate import solve
from reallm.planner.tables.budget import parse_budget
from reallm.planner.tables.measured_table import MeasuredTable, MeasurementRecord
from reallm.planner.tables.units import PlanError


class Encoder:
    """Looks costs up instead of encoding, and counts."""

    def __init__(self, matrices: Sequence[Matrix], noise: float) -> None:
        self.matrices = {matrix.name: matrix for matrix in matrices}
        self.costs = true_costs([*matrices], noise)
        self.encoded: list[tuple[str, str]] = []

    def __call__(self, *, formats: Mapping[str, Sequence[Format]]) -> Measured:
        wanted = [(self.matrices[name], fmt) for name, fmts in formats.items() for fmt in fmts]
        self.encoded += [(matrix.name, fmt.name) for matrix, fmt in wanted]
        return Measured([record(m, fmt, self.costs[m.name, fmt.name]) for m, fmt in wanted], 0)

    def everything(self) -> tuple[MeasurementRecord, ...]:
        return tuple(record(m, fmt, self.costs[m.name, fmt.name]) for m in self.matrices.values() for fmt in RATES)


def empty_table(matrices: Sequence[Matrix]) -> MeasuredTable:
    return MeasuredTable(
        model="model",
        model_sha256="0" * 64,
        text="text",
        text_sha256="0" * 64,
        settings={},
        dtype="bf16",
        other_tensors={},
        matrices=tuple(m.record() for m in matrices),
        measurements=(),
    )


def run(
    matrices: Sequence[Matrix],
    encoder: Encoder,
    budget: str,
    known: Sequence[MeasurementRecord] = (),
    gap: float = 0.02,
) -> MeasuredTable:
    table, formats = empty_table(matrices), {m.name: RATES for m in matrices}
    needed = NeededMeasurement(table, matrices, formats, encoder, parse_budget(budget), PlanOptions(), gap)
    measured, predictions = needed.run(known)
    return table.model_copy(update={"measurements": tuple(measured.records), "predictions": tuple(predictions)})


@pytest.mark.parametrize("budget", ["2.3bpw", "3bpw", "3.7bpw"])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_the_plan_is_as_good_as_with_everything_measured(budget: str, noise: float) -> None:
    matrices = [make_matrix(i) for i in range(100)]
    encoder = Encoder(matrices, noise)
    table = run(matrices, encoder, budget)
    assert len(encoder.encoded) == len({*encoder.encoded}) < 0.6 * len(matrices) * len(RATES)
    plan = solve(table, budget)
    optimum = solve(table.model_copy(update={"measurements": encoder.everything(), "predictions": ()}), budget)
    assert plan.unmeasured is not None and plan.unmeasured.gap <= 0.02
    assert optimum.unmeasured is None
    assert optimum.predicted_loss <= plan.predicted_loss <= 1.005 * optimum.predicted_loss
    assert plan.unmeasured.least_loss <= optimum.predicted_loss
    assert any("candidates were predicted and not measured" in note for note in plan.notes)


def test_a_smaller_gap_measures_more() -> None:
    matrices = [make_matrix(i) for i in range(60)]
    encoded = []
    for gap in (0.5, 0.01, 0.0):
        encoder = Encoder(matrices, 0.1)
        plan = solve(run(matrices, encoder, "3bpw", gap=gap), "3bpw")
        assert plan.unmeasured is not None and plan.unmeasured.gap <= gap
        encoded.append(len(encoder.encoded))
    assert encoded[0] < encoded[1] < encoded[2]


def test_the_next_budget_encodes_only_what_is_new() -> None:
    matrices = [make_matrix(i) for i in range(60)]
    encoder = Encoder(matrices, 0.05)
    table = run(matrices, encoder, "3bpw")
    first = len(encoder.encoded)
    run(matrices, encoder, "3bpw", table.measurements)
    assert len(encoder.encoded) == first
    run(matrices, encoder, "3.1bpw", table.measurements)
    assert first < len(encoder.encoded) < 1.7 * first
    assert len(encoder.encoded) == len({*encoder.encoded})


def test_embeddings_are_encoded_only_if_the_budget_counts_them() -> None:
    matrices = [*(make_matrix(i) for i in range(20)), make_matrix(20, "embedding")]
    encoder = Encoder(matrices, 0.0)
    run(matrices, encoder, "3bpw")
    assert matrices[-1].name not in {name for name, _ in encoder.encoded}
    run(matrices, encoder, "40KiB")
    assert sum(name == matrices[-1].name for name, _ in encoder.encoded) == len(RATES)


def test_a_budget_that_is_too_small_is_refused_before_anything_is_encoded() -> None:
    matrices = [make_matrix(i) for i in range(4)]
    formats = {m.name: RATES for m in matrices}
    with pytest.raises(PlanError, match="the smallest plan takes"):
        check_budget(empty_table(matrices), formats, parse_budget("1.5bpw"), PlanOptions())
    check_budget(empty_table(matrices), formats, parse_budget("2.3bpw"), PlanOptions())
