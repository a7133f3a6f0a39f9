"""`reallm plan`: from a measured folder and a budget to plan.json; needs no model and takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from reallm.codegen.cpu.linear import kernel_for
from reallm.codegen.ir.program import has_kernel
from reallm.errors import UserError
from reallm.kernels.formats.codecs import DenseCodec
from reallm.kernels.formats.formats import Format
from reallm.kernels.storage.atomic import write_text_atomic
from reallm.measurement.search_space import PRESETS, load_space
from reallm.planner.problem.candidates import PlanOptions
from reallm.planner.problem.latency import DEVICES, KINDS, Device
from reallm.planner.results.allocate import best_plans as best_plans_of
from reallm.planner.results.allocate import solve
from reallm.planner.results.explain import Alternative, alternatives, next_bytes
from reallm.planner.results.sweep import Point, as_csv, spaced
from reallm.planner.results.sweep import sweep as sweep_table
from reallm.planner.results.uniform import uniform_points
from reallm.planner.tables.measured_table import TABLE_FILE, MeasuredTable
from reallm.planner.tables.plan import PLAN_FILE, Cost, Plan, Ties
from reallm.planner.tables.records import read_record, write_record
from reallm.planner.tables.requirements import Requirements

TARGETS: Mapping[str, Callable[[Format], bool]] = {
    "triton": has_kernel,
    "cpu": lambda fmt: isinstance(fmt.codec, DenseCodec) or kernel_for(fmt) is not None,
}
"""Target -> whether it has a kernel for a format."""


def plan(
    work: str | Path,
    *,
    budget: str,
    output: str | Path | None = None,
    pins: Sequence[str] = (),
    exclude: Sequence[str] = (),
    formats: Sequence[str] | None = None,
    preset: str | None = None,
    ties: Ties = "none",
    cost: Cost = "two_sided",
    requirements: Requirements | None = None,
    target: str | None = None,
    time_limit_s: float = 60.0,
) -> Plan:
    """The plan of least predicted loss within `budget` ("3.0bpw", "48MiB"), from the table `measure` left in `work`.

    `preset` allows the formats of one published method only, as `space.PRESETS` names them, and `target` those that it
    has kernels for; the rest is the same. `requirements`: pools, latency, and what shares the budget's memory. Written
    to `output` where given. See `planner.results.allocate.solve` for the options and the errors; RecordError when
    `work` holds no table.
    """
    table, formats = _asked(work, formats, preset, target)
    result = solve(
        table,
        budget,
        pins=pins,
        exclude=exclude,
        formats=formats,
        ties=ties,
        cost=cost,
        requirements=requirements,
        time_limit_s=time_limit_s,
        work=str(work),
    )
    if output is not None:
        write_record(Path(output), result)
    return result


def sweep(
    work: str | Path,
    *,
    first: str,
    last: str,
    points: int = 21,
    output: str | Path | None = None,
    figure: str | Path | None = None,
    pins: Sequence[str] = (),
    exclude: Sequence[str] = (),
    formats: Sequence[str] | None = None,
    preset: str | None = None,
    ties: Ties = "none",
    cost: Cost = "two_sided",
    requirements: Requirements | None = None,
    target: str | None = None,
) -> list[Point]:
    """The best plan's size and predicted loss at `points` budgets from `first` to `last`, for example 2bpw to 5bpw.

    Budgets that no plan fits are left out. Written to `output` as CSV where given, drawn in `figure` (.png, .svg or
    .html) where given. PlanOptions and errors as for `plan`.
    """
    table, formats = _asked(work, formats, preset, target)
    allowed = None if formats is None else tuple(formats)
    plan_options = PlanOptions(tuple(pins), tuple(exclude), allowed, ties, cost, requirements or Requirements())
    budgets = spaced(first, last, points)
    if figure is not None:
        from reallm.reporting.report import check_figure, write_sweep_figure

        check_figure(Path(figure))
    found = sweep_table(table, budgets, plan_options)
    if output is not None:
        write_text_atomic(Path(output), as_csv(found))
    if figure is not None:
        scope = budgets[0].scope
        write_sweep_figure(Path(figure), table.model, found, uniform_points(table, scope, plan_options), scope)
    return found


def _asked(
    work: str | Path, formats: Sequence[str] | None, preset: str | None, target: str | None
) -> tuple[MeasuredTable, Sequence[str] | None]:
    """The table in `work`, and the formats allowed."""
    table = read_record(Path(work) / TABLE_FILE, MeasuredTable, "measure")
    if preset is not None:
        formats = [*(formats or ()), *preset_formats(table, preset, work)]
    return table, formats if target is None else target_formats(table, target, formats)


def target_formats(table: MeasuredTable, target: str, formats: Sequence[str] | None) -> list[str]:
    """Those of `formats` (None for all) in `table` that `target` has kernels for. Raises UserError for none."""
    if target not in TARGETS:
        raise UserError(f"--target {target}: no such target; there are {', '.join(TARGETS)}")
    measured = sorted({record.format for record in table.measurements})
    wanted = [name for name in measured if formats is None or any(fnmatchcase(name, f.lower()) for f in formats)]
    found = [name for name in wanted if TARGETS[target](Format.parse(name))]
    if not found:
        raise UserError(
            f"--target {target} has kernels for none of {', '.join(wanted) or 'the formats asked for'}: measure others"
        )
    return found


def preset_formats(table: MeasuredTable, preset: str, work: str | Path) -> list[str]:
    """The formats of `preset` that `table` holds. Raises UserError for an unknown preset or an unmeasured one."""
    if preset not in PRESETS:
        raise UserError(f"--preset {preset}: no such preset; there are {', '.join(PRESETS)}")
    space, measured = load_space(preset).formats, {record.format for record in table.measurements}
    found = sorted({fmt.name for formats in space.values() for fmt in formats} & measured)
    if not measured.intersection(fmt.name for fmt in space["linear"]):
        way_out = f"reallm measure {table.model} -o {work} --space {preset} (with the same --text) adds them"
        raise UserError(f"--preset {preset}: none of its formats was measured in {work}; {way_out}")
    return found


def best_plans(work: str | Path, *, budget: str, count: int, plan_options: PlanOptions | None = None) -> list[Plan]:
    """The `count` plans of least predicted loss within `budget`, the best first. Errors as for `plan`."""
    table = read_record(Path(work) / TABLE_FILE, MeasuredTable, "measure")
    return best_plans_of(table, budget, plan_options or PlanOptions(), count, work=str(work))


def explain(path: str | Path, matrix: str, *, work: str | Path | None = None) -> list[Alternative]:
    """Every candidate of the matrices that the regex `matrix` finds, at the shadow price of the plan in `path`.

    `work` names the measured folder if it has moved. Raises PlanError when its table is not the one planned from.
    """
    plan = read_plan(path)
    return alternatives(read_record(Path(work or plan.work) / TABLE_FILE, MeasuredTable, "measure"), plan, matrix)


def next_mib(path: str | Path, *, work: str | Path | None = None) -> tuple[Plan, Plan]:
    """The plan in `path` and the best one with a MiB more. As `explain`."""
    plan = read_plan(path)
    return plan, next_bytes(read_record(Path(work or plan.work) / TABLE_FILE, MeasuredTable, "measure"), plan)


def device(name: str) -> Device:
    """The device called `name`, or the one that the JSON file `name` describes. Raises UserError, RecordError."""
    if name in DEVICES:
        return DEVICES[name]
    if not Path(name).exists():
        raise UserError(
            f"--device {name}: no such device or file; there are {', '.join(DEVICES)}, or a JSON file with "
            "name, bytes_per_second, weights_per_second of each kind of codec and launch_seconds"
        )
    found = read_record(Path(name), Device, "plan --device")
    if missing := sorted(set(KINDS.values()) - set(found.weights_per_second)):
        raise UserError(f"--device {name}: weights_per_second lacks {', '.join(missing)}")
    return found


def read_plan(path: str | Path) -> Plan:
    """The plan in `path`: a plan.json, or an artifact's folder. Raises RecordError when there is none."""
    path = Path(path)
    return read_record(path / PLAN_FILE if path.is_dir() else path, Plan, "plan")
