"""The Pareto curve: predicted loss against size of the best plans, with a dot for each plan of a single format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, log, log10

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from reallm.planner.results.sweep import Point
from reallm.planner.results.uniform import UniformPoint
from reallm.planner.tables.plan import Plan, Scope
from reallm.planner.tables.units import GIB, MIB

from .canvas import CHARACTER
from .paint import Drawing, Paint, shortened

HEADROOM = 4.0
"""Single formats that lose more than this multiple of the curve's largest loss are not drawn."""


@dataclass(frozen=True, slots=True)
class Curve:
    """The points that are drawn: only those with a loss above zero, because the scale is logarithmic."""

    points: tuple[tuple[float, float], ...]
    """(size, loss) of the best plans, in order of rising size."""
    uniforms: tuple[tuple[float, float, str], ...]
    """(size, loss, format) of the single formats that are drawn."""
    beyond: int
    """Number of single formats outside the drawn range."""
    unit: str
    """Unit of the sizes, which is the label of the axis."""
    plan: tuple[float, float] | None
    """(size, loss) of the plan to mark, or None."""


def curve_of(points: Sequence[Point], uniforms: Sequence[UniformPoint], scope: Scope, plan: Plan | None) -> Curve:
    """The curve of a sweep; at least one of its plans must have a loss above zero.

    Sizes are in bits per weight, or in MiB or GiB of the weights file, as `scope` says.
    """
    large = max(point.counted_bytes for point in points) >= 4 * GIB
    unit, scale = ("GiB", GIB) if large else ("MiB", MIB)

    def size(counted_bytes: int, bits: float) -> float:
        return bits if scope == "matrices" else counted_bytes / scale

    drawn = sorted({(size(p.counted_bytes, p.bits_per_weight), p.predicted_loss) for p in points})
    drawn = [(x, loss) for x, loss in drawn if loss > 0]
    shown = []
    for u in uniforms:
        x = size(u.counted_bytes, u.bits_per_weight)
        if drawn[0][0] * 0.98 <= x <= drawn[-1][0] * 1.02 and 0 < u.predicted_loss <= HEADROOM * drawn[0][1]:
            shown.append((x, u.predicted_loss, u.format))
    marked = None
    if plan is not None and plan.predicted_loss > 0:
        marked = size(plan.counted_bytes, plan.bits_per_weight), plan.predicted_loss
    return Curve(
        points=tuple(drawn),
        uniforms=tuple(shown),
        beyond=len(uniforms) - len(shown),
        unit="bits per weight" if scope == "matrices" else f"{unit} of the weights file",
        plan=marked,
    )


def pareto(curve: Curve) -> Drawing:
    """The drawing of `curve`, which must have at least one point."""

    def draw(paint: Paint, width: int) -> Figure:
        height = 330.0 if width < 500 else 440.0
        figure = Figure(figsize=(width / 72, height / 72))
        left, right, top, bottom = 46.0, 12.0, 62.0, 44.0
        axes = figure.add_axes(
            (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
        )
        _style(axes, paint)
        axes.set_xlabel(curve.unit, color=paint["muted"], fontsize=11)
        xs, ys = [x for x, _ in curve.points], [y for _, y in curve.points]
        axes.plot(xs, ys, color=paint["accent"], linewidth=2, label="best mix", zorder=3)
        axes.scatter(xs, ys, s=9, color=paint["accent"], linewidth=0, zorder=3)
        if curve.uniforms:
            xs, ys = [x for x, _, _ in curve.uniforms], [y for _, y, _ in curve.uniforms]
            axes.scatter(
                xs, ys, s=26, facecolor="none", edgecolor=paint["muted"], linewidth=1.3, label="one format", zorder=2
            )
        if curve.plan:
            x, y = curve.plan
            axes.scatter([x], [y], s=90, color=paint["warm"], linewidth=0, label="this plan", zorder=4)
        _limits(axes, curve)
        _name_uniforms(axes, curve, paint, (width - left - right, height - top - bottom))
        figure.text(
            0, 1 - 12 / height, "predicted loss, nats per token", color=paint["muted"], fontsize=11, va="center"
        )
        legend = figure.legend(
            loc="center left",
            bbox_to_anchor=(0, 1 - 36 / height),
            ncols=3,
            frameon=False,
            borderpad=0,
            borderaxespad=0,
            handletextpad=0.4,
            columnspacing=1.2,
            handlelength=1.2,
            fontsize=11,
        )
        for text in legend.get_texts():
            text.set_color(paint["ink"])
        return figure

    return draw


def _style(axes: Axes, paint: Paint) -> None:
    axes.set_facecolor("none")
    axes.set_yscale("log")
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(paint["muted"])
    axes.grid(axis="y", color=paint["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=paint["muted"], labelsize=11, length=0, pad=5)


def _limits(axes: Axes, curve: Curve) -> None:
    dots = [*curve.points, *((x, y) for x, y, _ in curve.uniforms), *([curve.plan] if curve.plan else [])]
    xs, ys = [x for x, _ in dots], [y for _, y in dots]
    margin = 0.04 * (max(xs) - min(xs)) or 0.25 * max(xs)
    low, high = min(ys) / 1.5, max(ys) * 1.6
    axes.set_xlim(min(xs) - margin, max(xs) + margin)
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(FixedLocator(_ticks(low, high)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.locator_params(axis="x", nbins=7)


def _ticks(low: float, high: float) -> list[float]:
    """Round values from `low` to `high`: 1, 2 and 5 times powers of ten, or only powers of ten if that is too many."""
    decades = range(floor(log10(low)), floor(log10(high)) + 1)
    ticks = [float(f"{digit}e{decade}") for decade in decades for digit in (1, 2, 5)]
    inside = [tick for tick in ticks if low <= tick <= high]
    return inside if len(inside) <= 9 else [tick for tick in inside if f"{tick:e}"[0] == "1"]


def _name_uniforms(axes: Axes, curve: Curve, paint: Paint, size: tuple[float, float]) -> None:
    """Where there is room, write the name beside each single format that no smaller single format beats."""
    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()

    def pixel(x: float, y: float) -> tuple[float, float]:
        return (x - x0) / (x1 - x0) * size[0], (log(y) - log(y0)) / (log(y1) - log(y0)) * size[1]

    dots = [pixel(x, y) for x, y, _ in curve.uniforms]
    dots += [pixel(x, y) for x, y in (*curve.points, *([curve.plan] if curve.plan else []))]
    taken: list[tuple[float, float, float, float]] = [(x - 5, y - 5, x + 5, y + 5) for x, y in dots]
    best = float("inf")
    for x, y, name in sorted(curve.uniforms):
        if y >= best:
            continue
        best, text = y, shortened(name, 26)
        left, below = pixel(x, y)
        left, below = left + 6, below + 5
        label = (left, below, left + len(text) * 10 * CHARACTER, below + 11)
        if label[2] > size[0] or label[3] > size[1] or any(_overlap(label, other) for other in taken):
            continue
        taken.append(label)
        axes.annotate(
            text, (x, y), (6, 5), textcoords="offset points", color=paint["muted"], fontsize=10, va="bottom", zorder=2
        )


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
