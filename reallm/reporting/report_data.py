"""The data that a report shows: the plan and what can be computed from its measured table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote

from reallm.planner.problem.plan_options import PlanOptions
from reallm.planner.results.breakdown import costliest
from reallm.planner.results.explain import Alternative, alternatives, larger_plan, require_table, sweep_around
from reallm.planner.results.sweep import Point
from reallm.planner.results.uniform import UniformPoint, uniform_points
from reallm.planner.tables.measured_table import TABLE_FILE, MeasuredTable
from reallm.planner.tables.plan import Plan
from reallm.planner.tables.records import RecordError
from reallm.planner.tables.work_folder import find_table, folder_of, read_table

COSTLIEST = 10
"""Number of matrices that a report lists by name."""


@dataclass(frozen=True, slots=True)
class ReportData:
    """A plan and what can be computed from its measured table."""

    plan: Plan
    points: Sequence[Point] = ()
    """The best plans from half to twice the size of `plan`."""
    uniforms: Sequence[UniformPoint] = ()
    """Plans with a single format."""
    richer: Plan | None = None
    """The best plan whose budget is one MiB larger."""
    runners_up: Mapping[str, Alternative] = field(default_factory=dict)
    """Name of a matrix -> its second-best format, for the costliest matrices."""
    dense: Mapping[str, int] = field(default_factory=dict)
    """Family -> bytes of its matrices that the plan leaves uncompressed."""
    lacking: str = ""
    """What the report leaves out because the table is missing, and how to get the table; empty if it is there."""


def collect_report_data(plan: Plan, work: str | Path | None = None, plan_path: str | Path | None = None) -> ReportData:
    """Collect the data that a report on `plan` shows.

    `work` names the work folder if it has moved, and `plan_path` is where the plan was read from. Without `work`, it is
    not an error if the plan's work folder is gone or holds no such table: what depends on the table is left out, and
    `lacking` says so. Raises RecordError for a table that cannot be read, and PlanError when the table in `work` is not
    the one the plan was made from.
    """
    omitted = "the sweep, the next MiB and what runners-up cost are left out:"
    try:
        path = find_table(plan, plan_path, work)
    except RecordError:
        if work is not None:
            raise
        ways_out = (
            "`reallm report plan.json --work FOLDER` reads it from another folder, "
            f"`reallm measure {quote(plan.model)} -o FOLDER` measures again."
        )
        return ReportData(plan, lacking=f"{omitted} {Path(plan.work) / TABLE_FILE} does not exist. {ways_out}")
    table = read_table(path)
    if work is None and table.digest() != plan.table_sha256:
        way_out = f"`reallm plan {quote(str(folder_of(path)))} --budget {quote(plan.budget)}` plans from it."
        return ReportData(plan, lacking=f"{omitted} {path} is not the table that the plan was made from. {way_out}")
    require_table(table, plan)
    names = [choice.matrix for choice in costliest(plan, COSTLIEST)]
    candidates = alternatives(table, plan, f"^(?:{'|'.join(map(re.escape, names))})$")
    runners_up = {choice.matrix: choice.runner_up for choice in plan.choices}
    return ReportData(
        plan=plan,
        points=sweep_around(table, plan),
        uniforms=uniform_points(table, plan.scope, PlanOptions.of(plan)),
        richer=larger_plan(table, plan),
        runners_up={c.matrix: c for c in candidates if c.format == runners_up[c.matrix]},
        dense=_dense_bytes(table, plan),
    )


def _dense_bytes(table: MeasuredTable, plan: Plan) -> dict[str, int]:
    """Family -> bytes of its matrices that the plan leaves uncompressed."""
    sizes, names = dict[str, int](), frozenset(plan.dense)
    for matrix in table.matrices:
        if matrix.name in names:
            family = matrix.family or matrix.name
            sizes[family] = sizes.get(family, 0) + matrix.source_bytes
    return sizes
