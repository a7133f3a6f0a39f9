"""Bar charts: where the bytes go, the costliest matrices, and predicted against measured loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from reallm.planner.results.breakdown import CODES, DENSE, FACTORS, OUTLIERS, PARTS, TABLES, TRANSFORMS, short_names
from reallm.planner.tables.plan import Choice
from reallm.planner.tables.units import bytes_text

from .canvas import box, canvas, legend, text_width, write
from .paint import Drawing, Paint, shortened

ROLE: Mapping[str, str] = {
    CODES: "codes",
    TABLES: "tables",
    FACTORS: "factors",
    OUTLIERS: "outliers",
    TRANSFORMS: "transforms",
    DENSE: "dense",
}
"""What bytes are used for -> the role in `Paint` that gives its colour."""


def bytes_bars(families: Mapping[str, Mapping[str, int]]) -> Drawing:
    """A drawing with one bar per family, whose length is its bytes, divided by what the bytes are used for."""
    totals = {family: sum(parts.values()) for family, parts in families.items()}
    total_bytes, longest, names = sum(totals.values()), max(totals.values()), short_names(families)
    present = [part for part in PARTS if any(part in parts for parts in families.values())]

    def draw(paint: Paint, width: int) -> Figure:
        above = width < 500
        gutter = 0.0 if above else min(max(text_width(name, 11) for name in names.values()) + 12, 240.0)
        values = 0.0 if above else 130.0
        room, each = width - gutter - values, 40.0 if above else 28.0
        lines = 1 + sum(30 + text_width(part, 11) for part in present) // width
        top = 18 * lines + 12
        figure, axes = canvas(width, top + each * len(totals) + 2)
        legend(axes, 0, 8, width, paint, [(ROLE[part], part) for part in present])
        for index, (family, total) in enumerate(totals.items()):
            y, x = top + each * index, gutter
            amount = f"{bytes_text(total)}, {total / total_bytes:.1%}"
            name = shortened(names[family], 32)
            if above:
                write(axes, 0, y + 8, name, paint["ink"])
                write(axes, width, y + 8, amount, paint["muted"], align="right")
            else:
                write(axes, gutter - 12, y + 10, name, paint["ink"], align="right")
            bar = y + 18 if above else y + 2
            for part in (part for part in PARTS if part in families[family]):
                length = families[family][part] / longest * room
                box(axes, x, bar, length, 14 if above else 18, paint[ROLE[part]])
                x += length
            if not above:
                write(axes, x + 8, y + 11, amount, paint["muted"])
        return figure

    return draw


def costliest_bars(choices: Sequence[Choice], total_loss: float) -> Drawing:
    """A drawing with one bar per matrix: its share of the predicted loss `total_loss`, its format and its runner-up."""
    longest = max(choice.cost for choice in choices)

    def draw(paint: Paint, width: int) -> Figure:
        narrow = width < 500
        each = 56.0 if narrow else 42.0
        figure, axes = canvas(width, each * len(choices))
        for index, choice in enumerate(choices):
            y = each * index
            share = f"{choice.cost:.4g}" + (f", {choice.cost / total_loss:.1%}" if total_loss else "")
            formats = choice.format if choice.runner_up is None else f"{choice.format}, runner-up {choice.runner_up}"
            name = shortened(choice.matrix, 34 if narrow else 60)
            write(axes, 0, y + 8, name, paint["ink"])
            write(axes, width, y + 8, share, paint["ink"], align="right")
            if narrow:
                write(axes, 0, y + 24, shortened(formats, 52), paint["muted"], 10)
            else:
                write(axes, text_width(name, 11) + 10, y + 8, shortened(formats, 60), paint["muted"], 10)
            bar = y + (35 if narrow else 20)
            box(axes, 0, bar, width, 6, paint["raised"])
            box(axes, 0, bar, width * (choice.cost / longest if longest else 0.0), 6, paint["accent"])
        return figure

    return draw


def measured_bars(tried: Sequence[tuple[str, float, float]]) -> Drawing:
    """A drawing with one line per plan, from its predicted to its measured loss.

    `tried` has (name, predicted loss, measured loss) of each plan.
    """
    largest = max(max(predicted, measured) for _, predicted, measured in tried) or 1.0

    def draw(paint: Paint, width: int) -> Figure:
        narrow = width < 500
        top, each = 30.0, 66.0 if narrow else 50.0
        figure, axes = canvas(width, top + each * len(tried))
        legend(axes, 0, 8, width, paint, [("accent", "predicted"), ("warm", "measured")])
        left, room = 6.0, width - 12.0
        for index, (name, predicted, measured) in enumerate(tried):
            y = top + each * index
            values = f"{predicted:.4g} predicted, {measured:.4g} measured"
            values += f", {measured / predicted:.2f} times" if predicted else ""
            write(axes, 0, y + 8, shortened(name, 48), paint["ink"])
            if narrow:
                write(axes, 0, y + 24, values, paint["muted"])
            else:
                write(axes, width, y + 8, values, paint["muted"], align="right")
            line = y + (42 if narrow else 26)
            ends = [left + room * value / largest for value in (predicted, measured)]
            box(axes, left, line - 0.5, room, 1, paint["line"])
            box(axes, min(ends), line - 1.5, abs(ends[1] - ends[0]), 3, paint["muted"])
            for x, role in zip(ends, ("accent", "warm"), strict=True):
                axes.scatter([x], [line], s=64, color=paint[role], linewidth=0, clip_on=False)
        return figure

    return draw
