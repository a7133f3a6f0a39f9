"""What there is to show of a plan: itself, what its measured table adds, and the figures drawn of both."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote

from reallm.planner.problem.candidates import PlanOptions
from reallm.planner.results.breakdown import by_family, by_layer, costliest
from reallm.planner.results.explain import Alternative, alternatives, curve, next_bytes, require_table
from reallm.planner.results.sweep import Point
from reallm.planner.results.uniform import UniformPoint, uniform_points
from reallm.planner.tables.measured_table import TABLE_FILE, MeasuredTable
from reallm.planner.tables.plan import Plan
from reallm.planner.tables.records import read_record

from .figures.bars import bytes_bars, costliest_bars, measured_bars
from .figures.curve import curve_of, pareto
from .figures.heat import heat_map
from .figures.paint import Drawing

COSTLIEST = 10
"""Matrices that a report names."""


@dataclass(frozen=True, slots=True)
class ReportData:
    """A plan and what its table adds to it."""

    plan: Plan
    points: Sequence[Point] = ()
    """The best plans around its size."""
    uniforms: Sequence[UniformPoint] = ()
    richer: Plan | None = None
    """The best plan with a MiB more."""
    runners_up: Mapping[str, Alternative] = field(default_factory=dict)
    """Matrix -> its runner-up, of the dearest matrices."""
    dense: Mapping[str, int] = field(default_factory=dict)
    """Family -> bytes, of the matrices that took no part."""
    lacking: str = ""
    """What is left out for want of the table, and the way to it."""


def find(plan: Plan, work: str | Path | None = None) -> ReportData:
    """What there is to show of `plan`.

    `work` names the measured folder if it has moved; where the plan's own is gone or holds another table, what needs it
    is left out and `lacking` says so. Raises RecordError and PlanError for tables that cannot be read or do not fit.
    """
    where = Path(work or plan.work) / TABLE_FILE
    ways = f"`reallm report plan.json --work FOLDER` reads it elsewhere, `reallm measure {quote(plan.model)} -o FOLDER`"
    without = "the sweep, the next MiB and what runners-up cost are left out:"
    if work is None and not where.exists():
        return ReportData(plan, lacking=f"{without} {where} is not there. {ways} measures again.")
    table = read_record(where, MeasuredTable, "measure")
    if work is None and table.digest() != plan.table_sha256:
        again = f"`reallm plan {quote(plan.work)} --budget {plan.budget}` plans from it"
        return ReportData(plan, lacking=f"{without} {where} is another table now than the one planned from. {again}.")
    require_table(table, plan)
    names = [choice.matrix for choice in costliest(plan, COSTLIEST)]
    found = alternatives(table, plan, f"^(?:{'|'.join(map(re.escape, names))})$")
    runners_up = {choice.matrix: choice.runner_up for choice in plan.choices}
    return ReportData(
        plan=plan,
        points=curve(table, plan),
        uniforms=uniform_points(table, plan.scope, PlanOptions.of(plan)),
        richer=next_bytes(table, plan),
        runners_up={a.matrix: a for a in found if a.format == runners_up[a.matrix]},
        dense=_dense(table, plan),
    )


def _dense(table: MeasuredTable, plan: Plan) -> dict[str, int]:
    found, names = dict[str, int](), frozenset(plan.dense)
    for matrix in table.matrices:
        if matrix.name in names:
            family = matrix.family or matrix.name
            found[family] = found.get(family, 0) + matrix.source_bytes
    return found


def drawings(findings: ReportData) -> dict[str, Drawing]:
    """Name -> figure, of those that there is something to draw for."""
    plan, found = findings.plan, dict[str, Drawing]()
    found["bits"] = heat_map(by_layer(plan))
    if any(point.predicted_loss > 0 for point in findings.points):
        found["pareto"] = pareto(curve_of(findings.points, findings.uniforms, plan.scope, plan))
    if plan.measured is not None:
        found["measured"] = measured_bars(plan.measured.tried)
    found["bytes"] = bytes_bars(by_family(plan, findings.dense))
    if plan.predicted_loss > 0:
        found["dearest"] = costliest_bars(costliest(plan, COSTLIEST), plan.predicted_loss)
    return found
