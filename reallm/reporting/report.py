"""`reallm report`: a plan as one HTML file that people look at, and its figures as PNG; `reallm sweep --figure`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reallm.errors import UserError
from reallm.kernels.storage.atomic import write_bytes_atomic, write_text_atomic
from reallm.planner.results.sweep import Point
from reallm.planner.results.uniform import UniformPoint
from reallm.planner.tables.plan import Scope
from reallm.planning.plan import read_plan

from .figures.curve import curve_of, pareto
from .figures.paint import png, svg
from .plan_page import plan_page, sweep_page
from .report_data import ReportData, drawings, find

FIGURES = (".png", ".svg", ".html")


def report(
    path: str | Path,
    *,
    output: str | Path = "report.html",
    work: str | Path | None = None,
    png_folder: str | Path | None = None,
) -> ReportData:
    """Write the page of the plan in `path` (a plan.json or an artifact) to `output`, its figures to `png_folder`.

    `work` as for `findings.find`, whose errors it raises; UserError for an `output` that is no .html.
    """
    output = Path(output)
    if output.suffix.lower() not in (".html", ".htm") or output.is_dir():
        raise UserError(f"--output {output}: expected the name of an .html file, such as report.html")
    if png_folder is not None and Path(png_folder).exists() and not Path(png_folder).is_dir():
        raise UserError(f"--png {png_folder} is a file; expected a folder for the figures")
    findings = find(read_plan(path), work)
    figures = drawings(findings)
    write_text_atomic(output, plan_page(findings, figures))
    if png_folder is not None:
        for name, drawing in figures.items():
            write_bytes_atomic(Path(png_folder) / f"{name}.png", png(drawing))
    return findings


def check_figure(path: Path) -> None:
    """Raise UserError unless `path` names a figure that can be written."""
    if path.suffix.lower() not in FIGURES or path.is_dir():
        raise UserError(f"--figure {path}: expected a file's name that ends in {', '.join(FIGURES)}")


def write_sweep_figure(
    path: Path, model: str, points: Sequence[Point], uniforms: Sequence[UniformPoint], scope: Scope
) -> None:
    """The Pareto curve of a sweep, as the ending of `path` says. Raises UserError when there is nothing to draw."""
    if not any(point.predicted_loss > 0 for point in points):
        raise UserError(f"--figure {path}: no plan of this sweep loses anything; sweep smaller budgets")
    drawing = pareto(curve_of(points, uniforms, scope, None))
    if path.suffix.lower() == ".html":
        write_text_atomic(path, sweep_page(model, points, uniforms, drawing))
    else:
        write_bytes_atomic(path, svg(drawing) if path.suffix.lower() == ".svg" else png(drawing))
