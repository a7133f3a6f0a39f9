"""`reallm report`: one plan as an HTML page for people, and its figures as PNG files."""

from __future__ import annotations

from pathlib import Path

from reallm.artifacts.find import plan_of
from reallm.errors import UserError
from reallm.kernels.storage.atomic import write_bytes_atomic, write_text_atomic

from .report_data import ReportData, collect_report_data


def report(
    path: str | Path,
    *,
    output: str | Path = "report.html",
    work: str | Path | None = None,
    png_folder: str | Path | None = None,
) -> ReportData:
    """Write an HTML page that shows a plan, and return the data that the page shows.

    Parameters
    ----------
    path
        A plan.json, or an artifact.
    output
        The .html file to write. It needs no other file and no network.
    work
        The work folder, if it has moved since planning. If its measured table is missing, the page leaves out the
        sweep, the next MiB and the cost of the runners-up, and says so.
    png_folder
        A folder to write the figures to as PNG, if given.

    Raises
    ------
    UserError
        For an `output` that is not an .html file, or a `png_folder` that is a file; nothing is written then.
    RecordError, PlanError
        When the plan or the table in `work` cannot be read, or when the plan was made from another table.

    Examples
    --------
    >>> data = reallm.report("plan.json", output="report.html")
    >>> data.plan.budget
    '5bpw'
    """
    output = Path(output)
    if output.suffix.lower() not in (".html", ".htm") or output.is_dir():
        raise UserError(f"--output {output}: expected the name of an .html file, such as report.html")
    if png_folder is not None and Path(png_folder).exists() and not Path(png_folder).is_dir():
        raise UserError(f"--png {png_folder} is a file; expected a folder for the figures")
    data = collect_report_data(plan_of(path), work, path)
    from .figures.drawings import drawings  # from here on, matplotlib is needed
    from .figures.paint import png
    from .plan_page import plan_page

    figures = drawings(data)
    write_text_atomic(output, plan_page(data, figures))
    if png_folder is not None:
        for name, drawing in figures.items():
            write_bytes_atomic(Path(png_folder) / f"{name}.png", png(drawing))
    return data
