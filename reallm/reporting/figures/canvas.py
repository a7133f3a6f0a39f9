"""A figure with pixel coordinates, y pointing down: rectangles, text, and a legend of colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .paint import Paint, plain

CHARACTER = 0.6
"""Width of a character divided by the font size: slightly more than the mean in DejaVu Sans."""


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure of `width` x `height` pixels, and its axes."""
    figure = Figure(figsize=(width / 72, height / 72))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    return figure, axes


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str) -> None:
    """Draw a filled rectangle."""
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, linewidth=0, clip_on=False))


def write(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    colour: str,
    size: float = 11,
    align: Literal["left", "center", "right"] = "left",
    rotation: float = 0,
) -> None:
    """Draw one line of text; `y` is its vertical middle, or where vertical text (`rotation` 90) begins."""
    axes.text(
        x,
        y,
        plain(text),
        color=colour,
        fontsize=size,
        ha="left" if rotation else align,
        va="center_baseline",
        rotation=rotation,
        rotation_mode="anchor",
    )


def text_width(text: str, size: float) -> float:
    """Approximate width of `text` in pixels."""
    return len(text) * size * CHARACTER


def legend(axes: Axes, x: float, y: float, width: float, paint: Paint, entries: Sequence[tuple[str, str]]) -> float:
    """Draw a colour swatch and a name for each (role, name) of `entries`, in one or more lines; return the y below."""
    left = x
    for role, name in entries:
        needed = 16 + text_width(name, 11) + 14
        if left > x and left + needed - 14 > x + width:
            left, y = x, y + 18
        box(axes, left, y - 5, 10, 10, paint[role])
        write(axes, left + 15, y, name, paint["muted"])
        left += needed
    return y + 18
