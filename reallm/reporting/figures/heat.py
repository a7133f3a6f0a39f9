"""A heat map of bits per weight by layer and role: layers in columns on a wide screen, in rows on a narrow one."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, sqrt

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reallm.planner.results.breakdown import Grid, short_names

from .canvas import box, canvas, text_width, write
from .paint import STEPS, Drawing, Paint, shortened, steps

_OUTSIDE = 24.0
"""Height in pixels of a cell for a matrix outside the layers."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Positions and sizes of the cells, in pixels."""

    layers_in_rows: bool
    columns: list[str]
    """Names of the columns."""
    rows: list[str]
    """Names of the rows."""
    gutter: float
    """Width of the space for the row names."""
    cell_width: float
    cell_height: float
    vertical_names: bool
    """Whether the names of the columns are written vertically."""
    top: float
    """Height of the space for the column names."""

    @property
    def below(self) -> float:
        """The y coordinate just below the cells of the layers."""
        return self.top + self.cell_height * len(self.rows) + (10 if self.rows else 0)

    def corner(self, layer: int, family: int) -> tuple[float, float]:
        """The upper left corner of the cell for the layer and the family with these indices."""
        column, row = (family, layer) if self.layers_in_rows else (layer, family)
        return self.gutter + self.cell_width * column, self.top + self.cell_height * row


def _layout(layers: list[str], families: list[str], width: int) -> _Layout:
    layers_in_rows = width < 500
    columns, rows = (families, layers) if layers_in_rows else (layers, families)
    gutter = max([text_width(label, 11) for label in rows] + [text_width("layer", 11)]) + 8
    cell_width = min((width - gutter) / max(len(columns), 1), 46.0 if layers_in_rows else 40.0)
    longest = max((text_width(label, 11) for label in columns), default=0.0)
    vertical_names = layers_in_rows and longest > cell_width
    cell_height = 26.0 if not layers_in_rows else 20.0 if len(rows) <= 48 else 11.0
    top = 0.0 if not columns else (longest if vertical_names else 12.0) + 8
    return _Layout(layers_in_rows, columns, rows, gutter, cell_width, cell_height, vertical_names, top)


def heat_map(grid: Grid) -> Drawing:
    """The drawing of `grid`, which must have at least one family."""
    bits = [tally.bits for tally in (*grid.cells.values(), *grid.outside.values())]
    shades = steps(bits)
    inside, outside = shades[: len(grid.cells)], shades[len(grid.cells) :]
    names = short_names([*grid.families, *grid.outside])
    layers, families = [str(layer) for layer in grid.layers], [shortened(names[f], 18) for f in grid.families]
    row = {layer: index for index, layer in enumerate(grid.layers)}
    column = {family: index for index, family in enumerate(grid.families)}

    def draw(paint: Paint, width: int) -> Figure:
        layout = _layout(layers, families, width)
        scale = layout.below + _OUTSIDE * len(grid.outside) + (10 if grid.outside else 4)
        figure, axes = canvas(width, scale + 46)
        _labels(axes, layout, paint)
        for ((layer, family), tally), shade in zip(grid.cells.items(), inside, strict=True):
            x, y = layout.corner(row[layer], column[family])
            _cell(axes, (x, y, layout.cell_width, layout.cell_height), tally.bits, shade, paint)
        for index, ((family, tally), shade) in enumerate(zip(grid.outside.items(), outside, strict=True)):
            y, wide = layout.below + _OUTSIDE * index, max(layout.cell_width, 40.0)
            _cell(axes, (layout.gutter, y, wide, _OUTSIDE), tally.bits, shade, paint)
            name = shortened(names[family], int((width - layout.gutter - wide - 8) / 7))
            write(axes, layout.gutter + wide + 8, y + _OUTSIDE / 2, name, paint["muted"])
        _scale(axes, layout.gutter, scale, min(width - layout.gutter, 320.0), (min(bits), max(bits)), paint)
        return figure

    return draw


def _labels(axes: Axes, layout: _Layout, paint: Paint) -> None:
    gutter, cell, top, colour = layout.gutter, layout.cell_width, layout.top, paint["muted"]
    if layout.columns:
        write(axes, gutter - 8, top - 9, "layer", colour, align="right")
    widest = max(text_width(label, 11) + 4 for label in ("", *layout.columns))
    every = 1 if layout.layers_in_rows else ceil(widest / cell)
    for index, label in enumerate(layout.columns):
        if layout.vertical_names:
            write(axes, gutter + cell * (index + 0.5), top - 6, label, colour, rotation=90)
        elif index % every == 0:
            write(axes, gutter + cell * (index + 0.5), top - 9, label, colour, align="center")
    every = 1 if layout.cell_height > 12 else 2
    for index, label in enumerate(layout.rows):
        if index % every == 0:
            write(axes, gutter - 8, top + layout.cell_height * (index + 0.5), label, colour, align="right")


def _cell(axes: Axes, bounds: tuple[float, float, float, float], value: float, shade: int, paint: Paint) -> None:
    x, y, width, height = bounds
    gap = 1.5 if min(width, height) > 8 else 0.5
    box(axes, x, y, width - gap, height - gap, paint[f"heat{shade}"])
    text = f"{value:.2f}" if value < 10 else f"{value:.1f}"
    size = min(11.0, (width - gap - 2) / text_width(text, 1), height - gap - 5)
    if size >= 8:
        write(axes, x + (width - gap) / 2, y + (height - gap) / 2, text, paint[f"on{shade}"], size, "center")


def _scale(axes: Axes, x: float, y: float, width: float, ends: tuple[float, float], paint: Paint) -> None:
    """Draw the legend of the shades; `ends` are the smallest and the largest number of bits per weight."""
    low, high = ends
    each = width / STEPS
    for step in range(STEPS if high > low else 1):
        box(axes, x + each * step, y, each, 10, paint[f"heat{step}"])
    if high == low:
        write(axes, x + each + 8, y + 5, f"{low:.2f} bits per weight", paint["muted"])
        return
    write(axes, x, y + 21, f"{low:.2f}", paint["muted"])
    write(axes, x + width / 2, y + 21, f"{sqrt(low * high):.2f}", paint["muted"], align="center")
    write(axes, x + width, y + 21, f"{high:.2f}", paint["muted"], align="right")
    write(axes, x, y + 38, "bits per weight, logarithmic", paint["muted"])
