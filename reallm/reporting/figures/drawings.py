"""The figures of a report."""

from __future__ import annotations

from reallm.planner.results.breakdown import by_family, by_layer, costliest
from reallm.reporting.report_data import COSTLIEST, ReportData

from .bars import bytes_bars, costliest_bars, measured_bars
from .curve import curve_of, pareto
from .heat import heat_map
from .paint import Drawing


def drawings(data: ReportData) -> dict[str, Drawing]:
    """Name -> figure, for every figure that there is data for."""
    plan, figures = data.plan, dict[str, Drawing]()
    figures["bits"] = heat_map(by_layer(plan))
    if any(point.predicted_loss > 0 for point in data.points):
        figures["pareto"] = pareto(curve_of(data.points, data.uniforms, plan.scope, plan))
    if plan.measured is not None:
        figures["measured"] = measured_bars(plan.measured.tried)
    figures["bytes"] = bytes_bars(by_family(plan, data.dense))
    if plan.predicted_loss > 0:
        figures["costliest"] = costliest_bars(costliest(plan, COSTLIEST), plan.predicted_loss)
    return figures
