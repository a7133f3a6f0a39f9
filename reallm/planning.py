"""`reallm plan`: from a measured folder and a budget to plan.json; needs no model and takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reallm.planner.allocate import solve
from reallm.planner.candidates import Cost, Ties
from reallm.planner.plan import PLAN_FILE, Plan
from reallm.planner.records import TABLE_FILE, MeasuredTable, read_record, write_record


def plan(
    work: str | Path,
    *,
    budget: str,
    output: str | Path | None = None,
    pins: Sequence[str] = (),
    exclude: Sequence[str] = (),
    formats: Sequence[str] | None = None,
    ties: Ties = "none",
    cost: Cost = "two_sided",
    time_limit_s: float = 60.0,
) -> Plan:
    """The plan of least predicted loss within `budget` ("3.0bpw", "48MiB"), from the table `measure` left in `work`.

    Written to `output` where given. See `reallm.planner.allocate.solve` for the wishes and the errors; RecordError when
    `work` holds no table.
    """
    table = read_record(Path(work) / TABLE_FILE, MeasuredTable, "measure")
    result = solve(
        table,
        budget,
        pins=pins,
        exclude=exclude,
        formats=formats,
        ties=ties,
        cost=cost,
        time_limit_s=time_limit_s,
        work=str(work),
    )
    if output is not None:
        write_record(Path(output), result)
    return result


def read_plan(path: str | Path) -> Plan:
    """The plan in `path`: a plan.json, or an artifact's folder. Raises RecordError when there is none."""
    path = Path(path)
    return read_record(path / PLAN_FILE if path.is_dir() else path, Plan, "plan")
