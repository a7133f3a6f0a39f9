"""Bits per weight by layer and role, as a heat map: layers across on a desk, down on a phone."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, sqrt

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reallm.planner.results.breakdown import Grid, short_names

from .canvas import box, canvas, text_width, write
from .paint import STEPS, Drawing, Paint, shortened, steps

_OUTSIDE = 24.0
"""Height of a cell outside the layers."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the cells are, in pixels."""

    upright: bool
    across: list[str]
    down: list[str]
    gutter: float
    cell: float
    tall: float
    turned: bool
    """Whether the names of the columns stand upright."""
    top: float

    @property
    def below(self) -> float:
        """Where the cells of the layers end."""
        return self.top + self.tall * len(self.down) + (10 if self.down else 0)

    def place(self, layer: int, family: int) -> tuple[float, float]:
        """The corner of the cell of the `layer`-th layer and the `family`-th family."""
        column, row = (family, layer) if self.upright else (layer, family)
        return self.gutter + self.cell * column, self.top + self.tall * row


def _layout(layers: list[str], families: list[str], width: int) -> _Layout:
    upright = width < 500
    across, down = (families, layers) if upright else (layers, families)
    gutter = max([text_width(label, 11) for label in down] + [text_width("layer", 11)]) + 8
    cell = min((width - gutter) / max(len(across), 1), 46.0 if upright else 40.0)
    longest = max((text_width(label, 11) for label in across), default=0.0)
    turned = upright and longest > cell
    tall = 26.0 if not upright else 20.0 if len(down) <= 48 else 11.0
    top = 0.0 if not across else (longest if turned else 12.0) + 8
    return _Layout(upright, across, down, gutter, cell, tall, turned, top)


def heat_map(grid: Grid) -> Drawing:
    """The drawing of `grid`, which holds one family or more."""
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
            x, y = layout.place(row[layer], column[family])
            _cell(axes, (x, y, layout.cell, layout.tall), tally.bits, shade, paint)
        for index, ((family, tally), shade) in enumerate(zip(grid.outside.items(), outside, strict=True)):
            y, wide = layout.below + _OUTSIDE * index, max(layout.cell, 40.0)
            _cell(axes, (layout.gutter, y, wide, _OUTSIDE), tally.bits, shade, paint)
            name = shortened(names[family], int((width - layout.gutter - wide - 8) / 7))
            write(axes, layout.gutter + wide + 8, y + _OUTSIDE / 2, name, paint["muted"])
        _scale(axes, layout.gutter, scale, min(width - layout.gutter, 320.0), (min(bits), max(bits)), paint)
        return figure

    return draw


def _labels(axes: Axes, layout: _Layout, paint: Paint) -> None:
    gutter, cell, top, colour = layout.gutter, layout.cell, layout.top, paint["muted"]
    if layout.across:
        write(axes, gutter - 8, top - 9, "layer", colour, align="right")
    every = 1 if layout.upright else ceil(max(text_width(label, 11) + 4 for label in ("", *layout.across)) / cell)
    for index, label in enumerate(layout.across):
        if layout.turned:
            write(axes, gutter + cell * (index + 0.5), top - 6, label, colour, rotation=90)
        elif index % every == 0:
            write(axes, gutter + cell * (index + 0.5), top - 9, label, colour, align="center")
    every = 1 if layout.tall > 12 else 2
    for index, label in enumerate(layout.down):
        if index % every == 0:
            write(axes, gutter - 8, top + layout.tall * (index + 0.5), label, colour, align="right")


def _cell(axes: Axes, place: tuple[float, float, float, float], value: float, shade: int, paint: Paint) -> None:
    x, y, width, height = place
    gap = 1.5 if min(width, height) > 8 else 0.5
    box(axes, x, y, width - gap, height - gap, paint[f"heat{shade}"])
    text = f"{value:.2f}" if value < 10 else f"{value:.1f}"
    size = min(11.0, (width - gap - 2) / text_width(text, 1), height - gap - 5)
    if size >= 8:
        write(axes, x + (width - gap) / 2, y + (height - gap) / 2, text, paint[f"on{shade}"], size, "center")


def _scale(axes: Axes, x: float, y: float, width: float, ends: tuple[float, float], paint: Paint) -> None:
    """The key of the shades, `ends` the least and the most bits."""
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
