"""`reallm sweep`: the best plan for each of many budgets, as numbers, as CSV and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from reallm.errors import UserError
from reallm.kernels.storage.atomic import write_bytes_atomic, write_text_atomic
from reallm.planner.problem.plan_options import PlanKeywords, PlanOptions, merged_options
from reallm.planner.results.sweep import Point
from reallm.planner.results.uniform import UniformPoint, uniform_points
from reallm.planner.tables.budget import parse_budget
from reallm.planner.tables.plan import Scope
from reallm.planner.tables.work_folder import read_table
from reallm.planning.allowed_formats import with_allowed_formats
from reallm.planning.plan import sweep as sweep_budgets

ENDINGS = (".png", ".svg", ".html")
"""File name endings of the figures that a sweep can be drawn as."""


def sweep(
    work: str | Path,
    *,
    first: str,
    last: str,
    points: int = 21,
    output: str | Path | None = None,
    figure: str | Path | None = None,
    options: PlanOptions | None = None,
    **keywords: Unpack[PlanKeywords],
) -> list[Point]:
    """Size and predicted loss of the best plan for each of many budgets: the Pareto curve of a model.

    Parameters
    ----------
    work
        The folder that `measure` filled.
    first, last
        The ends of the range, in the same unit, for example "2bpw" and "5bpw".
    points
        Number of evenly spaced budgets. A budget that is too small for any plan is left out of the result.
    output
        Where to write the points as CSV, if given.
    figure
        Where to draw the points, if given: a .png, .svg or .html file. For comparison it also shows the plans that use
        one format for all matrices.
    options, keywords
        Further requirements on the plans, as for `plan`.

    Raises
    ------
    PlanError
        For ends with different units, for options that cannot be met, and if no plan fits any of the budgets.
    UserError
        If the file name of the figure has an unknown ending, if a figure is wanted but every plan has a predicted loss
        of zero, and whenever `plan` raises it.
    RecordError
        When `work` holds no measured table.

    Examples
    --------
    >>> points = reallm.sweep("work", first="5bpw", last="8bpw", points=4)
    >>> [point.budget for point in points]
    ['5bpw', '6bpw', '7bpw', '8bpw']
    """
    if figure is not None:
        _check_figure(Path(figure))
    result = sweep_budgets(work, first=first, last=last, points=points, output=output, options=options, **keywords)
    if figure is not None:
        table, scope = read_table(work), parse_budget(first).scope
        resolved = with_allowed_formats(merged_options(options, keywords), table, work)
        _write_figure(Path(figure), table.model, result, uniform_points(table, scope, resolved), scope)
    return result


def _check_figure(path: Path) -> None:
    if path.suffix.lower() not in ENDINGS or path.is_dir():
        raise UserError(f"--figure {path}: expected a file name that ends in {', '.join(ENDINGS)}")


def _write_figure(
    path: Path, model: str, points: Sequence[Point], uniforms: Sequence[UniformPoint], scope: Scope
) -> None:
    """Draw the Pareto curve in the format that the ending of `path` names."""
    from .figures.curve import curve_of, pareto  # matplotlib is needed for a figure only
    from .figures.paint import png, svg
    from .plan_page import sweep_page

    if not any(point.predicted_loss > 0 for point in points):
        raise UserError(f"--figure {path}: all plans of the sweep have a predicted loss of zero; sweep smaller budgets")
    drawing = pareto(curve_of(points, uniforms, scope, None))
    ending = path.suffix.lower()
    if ending == ".html":
        write_text_atomic(path, sweep_page(model, points, uniforms, drawing))
    else:
        write_bytes_atomic(path, svg(drawing) if ending == ".svg" else png(drawing))
