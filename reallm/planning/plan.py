"""`reallm plan` and the commands that compare plans. They need a work folder, not the model, and take seconds."""

from __future__ import annotations

import logging
from pathlib import Path
from shlex import quote
from typing import Unpack

from reallm.artifacts.find import plan_of
from reallm.errors import UserError
from reallm.kernels.storage.atomic import write_text_atomic
from reallm.planner.problem.plan_options import PlanKeywords, PlanOptions, merged_options
from reallm.planner.results import allocate
from reallm.planner.results import sweep as sweeps
from reallm.planner.results.differences import Change, differences
from reallm.planner.results.explain import Alternative, alternatives, larger_plan
from reallm.planner.results.sweep import Point, as_csv, spaced_budgets
from reallm.planner.tables.device import DEVICES, KINDS, Device
from reallm.planner.tables.measured_table import MeasuredTable
from reallm.planner.tables.plan import Plan
from reallm.planner.tables.records import read_record, write_record
from reallm.planner.tables.work_folder import EARLIER_FOLDER, described, folder_of, read_table, table_of, tables_in
from reallm.targets.engines import ENGINES

from .allowed_formats import with_allowed_formats
from .plan_file import replaced_plan

LOG = logging.getLogger(__name__)


def plan(
    work: str | Path,
    *,
    budget: str,
    output: str | Path | None = None,
    options: PlanOptions | None = None,
    **keywords: Unpack[PlanKeywords],
) -> Plan:
    """Choose the format of every matrix so that the predicted loss is minimal within a budget.

    Parameters
    ----------
    work
        The folder that `measure` filled, whose newest table is used; or the file of one of its tables (an earlier one
        is in its folder `tables`).
    budget
        "3.0bpw" (bits per weight of the matrices that take part), or "48MiB", "4GiB" (the whole weights file).
    output
        Where to write the plan as JSON, if given. An earlier plan there is replaced; any other file is not.
    options
        What else to ask of the plan; `PlanOptions` describes every field.
    keywords
        Single fields of `PlanOptions`, such as `pins=["lm_head=int8-g64"]`; they take the place of those in `options`.

    Raises
    ------
    PlanError
        For a budget that is too small (the message names the smallest one), and for options that cannot be met.
    UserError
        For an unknown preset or target, or one without measured formats, and for an `output` that is not a plan.
    RecordError
        When `work` holds no measured table.

    Examples
    --------
    >>> plan = reallm.plan("work", budget="5bpw", output="plan.json", pins=["layers.0.self_attn=int8-g16"])
    >>> plan.bits_per_weight <= 5, plan.bound.status
    (True, 'optimal')
    """
    if output is not None:
        replaced_plan(output)
    table = _chosen_table(work)
    merged = merged_options(options, keywords)
    result = allocate.solve(table, budget, with_allowed_formats(merged, table, work), work=str(folder_of(work)))
    if merged.target is not None and merged.target in ENGINES:
        result = result.model_copy(update={"notes": (*result.notes, ENGINES[merged.target].note)})
    if output is not None:
        write_record(Path(output), result)
    return result


def best_plans(
    work: str | Path,
    *,
    budget: str,
    count: int,
    options: PlanOptions | None = None,
    **keywords: Unpack[PlanKeywords],
) -> list[Plan]:
    """The `count` plans with the least predicted loss within `budget`, the best first. Otherwise like `plan`."""
    table = read_table(work)
    resolved = with_allowed_formats(merged_options(options, keywords), table, work)
    return allocate.best_plans(table, budget, resolved, count, work=str(folder_of(work)))


def _chosen_table(work: str | Path) -> MeasuredTable:
    """The table that `work` names. Logs how to name another one, if the folder has tables of other settings."""
    table = read_table(work)
    if not (Path(work) / EARLIER_FOLDER).is_dir():
        return table
    others = {t.settings.get("identity"): (path, t) for path, t in reversed([*tables_in(Path(work))])}
    others.pop(table.settings.get("identity"), None)
    for path, other in reversed(others.values()):
        LOG.info(
            "%s also has measurements of %s; to plan from these, name %s in place of the folder",
            work,
            described(other),
            quote(str(path)),
        )
    return table


def sweep(
    work: str | Path,
    *,
    first: str,
    last: str,
    points: int = 21,
    output: str | Path | None = None,
    options: PlanOptions | None = None,
    **keywords: Unpack[PlanKeywords],
) -> list[Point]:
    """Size and predicted loss of the best plan for each of `points` budgets from `first` to `last`.

    Budgets that no plan fits are left out. The points are written to `output` as CSV if it is given. Options and errors
    are those of `plan`; `reallm.reporting.sweep.sweep` also draws the curve.
    """
    table = _chosen_table(work)
    resolved = with_allowed_formats(merged_options(options, keywords), table, work)
    result = sweeps.sweep(table, spaced_budgets(first, last, points), resolved)
    if output is not None:
        write_text_atomic(Path(output), as_csv(result))
    return result


def explain(path: str | Path, matrix: str, work: str | Path | None = None) -> list[Alternative]:
    """Every measured format of the matrices that the regex `matrix` matches, at the shadow price of a plan.

    Parameters
    ----------
    path
        A plan.json, or an artifact.
    matrix
        A regex that is searched for in the names of the plan's matrices.
    work
        The work folder, if it has moved since planning.

    Raises
    ------
    PlanError
        For a regex that is invalid or matches nothing, and if the plan was not made from the table in `work`.
    RecordError
        When the plan or the table cannot be read.

    Examples
    --------
    >>> alternatives = reallm.explain("plan.json", "layers.1.self_attn.q_proj")
    >>> sorted(alternative.format for alternative in alternatives)
    ['fp32', 'int4-g16', 'int8-g16', 'tq3-l8+rot']
    """
    explained = plan_of(path)
    return alternatives(table_of(explained, path, work), explained, matrix)


def diff(before: str | Path, after: str | Path) -> list[Change]:
    """The matrices that two plans (or artifacts) of one model store differently, the largest change of loss first.

    Raises PlanError for plans of different models, RecordError when one cannot be read.
    """
    return differences(plan_of(before), plan_of(after))


def next_mib(path: str | Path, work: str | Path | None = None) -> tuple[Plan, Plan]:
    """The plan in `path`, and the best plan with one MiB more. Parameters and errors as for `explain`."""
    current = plan_of(path)
    return current, larger_plan(table_of(current, path, work), current)


def load_device(name: str) -> Device:
    """The built-in device called `name`, or the one that the JSON file `name` describes.

    Raises UserError for an unknown name or missing rates, RecordError for an invalid file.
    """
    if name in DEVICES:
        return DEVICES[name]
    if not Path(name).exists():
        raise UserError(
            f"--device {name}: no such device or file; expected one of {', '.join(DEVICES)}, or a JSON file with "
            "name, bytes_per_second, launch_seconds, and weights_per_second for each kind of codec"
        )
    device = read_record(Path(name), Device, "plan --device")
    if missing := sorted(set(KINDS.values()) - set(device.weights_per_second)):
        raise UserError(f"--device {name}: weights_per_second lacks {', '.join(missing)}")
    return device
