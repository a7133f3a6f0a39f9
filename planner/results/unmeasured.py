"""What a plan may be losing to candidates whose costs were predicted and not measured."""

from __future__ import annotations

from math import exp

from reallm.planner.tables.measured_table import MeasuredTable, MeasurementRecord, PredictionRecord
from reallm.planner.tables.plan import Plan, Unmeasured

PREDICTED = "predicted"
"""Stands in for the digest of codes that do not exist yet."""
DEVIATIONS = 2.0
"""How many standard deviations better than predicted an unmeasured candidate may be when the gap is computed."""


def with_predictions(table: MeasuredTable, deviations: float = 0.0) -> MeasuredTable:
    """`table` with its predictions as if they were measurements, each `deviations` standard deviations lower."""
    predicted = tuple(_as_measurement(prediction, deviations) for prediction in table.predictions)
    return table.model_copy(update={"measurements": (*table.measurements, *predicted), "predictions": ()})


def _as_measurement(prediction: PredictionRecord, deviations: float) -> MeasurementRecord:
    values = prediction.model_dump(exclude={"deviations"})
    lowered = {cost: values[cost] * exp(-deviations * each) for cost, each in prediction.deviations.items()}
    return MeasurementRecord(**(values | lowered), seconds=0.0, codes_sha256=PREDICTED)


def unmeasured(plan: Plan, hopeful: Plan, candidates: int) -> Unmeasured:
    """What `plan` may lack to `hopeful`, the best plan if the `candidates` predicted ones are better."""
    least = min(hopeful.predicted_loss, plan.predicted_loss)
    gap = 1 - least / plan.predicted_loss if plan.predicted_loss else 0.0
    return Unmeasured(candidates=candidates, least_loss=least, deviations=DEVIATIONS, gap=gap)


def described(unmeasured: Unmeasured) -> str:
    """One sentence on what was not measured, for the notes of a plan."""
    return (
        f"{unmeasured.candidates} candidates were predicted and not measured: if each were {unmeasured.deviations:g} "
        f"standard deviations better than predicted, the predicted loss would be {unmeasured.gap:.1%} lower"
    )
