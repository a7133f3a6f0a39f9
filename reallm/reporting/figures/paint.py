"""Colours by role, in a light and a dark scheme, and the conversion of drawings to SVG and PNG.

A drawing is a function of the colours and a width in pixels, so it can be drawn once for a phone and once for a wide
screen. For a page, the SVG is drawn with a placeholder for every role, which then becomes `var(--role)`: the page's
style sheet sets the colour, and one file serves both schemes. Text in such an SVG stays text.

The same drawing always gives the same bytes: matplotlib's default settings are used instead of the user's, and no
date is written to the files.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from math import log
from typing import Any
from xml.etree import ElementTree

from matplotlib import style
from matplotlib.figure import Figure

Paint = Mapping[str, str]
"""Role of a colour, such as "ink" -> the colour as #rrggbb."""
Drawing = Callable[[Paint, int], Figure]
"""(colours, width in pixels) -> figure."""
NARROW, WIDE = 350, 880
"""Widths in pixels; figures have 72 dots per inch, so a pixel is a point."""
STEPS = 12
"""Number of shades of the heat map."""
_PNG_DPI = 180
_SETTINGS: dict[str, Any] = {
    "figure.dpi": 72,
    "font.family": ["DejaVu Sans"],
    "font.size": 11,
    "text.parse_math": False,  # a name may hold dollars
    "axes.unicode_minus": False,
}


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def luminance(colour: str) -> float:
    """Relative luminance as defined in WCAG 2, from 0 to 1."""
    channels = [c / 255 for c in _rgb(colour)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours as defined in WCAG 2, from 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _ramp(anchors: tuple[str, ...]) -> Paint:
    """STEPS shades through `anchors` as heat0, heat1, ..., and black or white for the text on them as on0, on1, ..."""
    ramp = {}
    for step in range(STEPS):
        position = step / (STEPS - 1) * (len(anchors) - 1)
        index = min(int(position), len(anchors) - 2)
        ends = zip(_rgb(anchors[index]), _rgb(anchors[index + 1]), strict=True)
        shade = "#" + "".join(f"{round(low + (high - low) * (position - index)):02x}" for low, high in ends)
        ramp[f"heat{step}"] = shade
        ramp[f"on{step}"] = _ink_on(shade)
    return ramp


def _ink_on(shade: str) -> str:
    return max("#000000", "#ffffff", key=lambda ink: contrast(ink, shade))


LIGHT: Paint = {
    **{"paper": "#ffffff", "raised": "#f5f7f7", "ink": "#15191c", "muted": "#5a646b", "line": "#d8dee0"},
    **{"accent": "#17697a", "warm": "#b23a1e"},
    **{"codes": "#17697a", "tables": "#e3a72f", "factors": "#b23a1e", "outliers": "#7657a8"},
    **{"transforms": "#8dbac4", "dense": "#9da6ac"},
    **_ramp(("#eaf2ef", "#a6d3c8", "#4a9ea3", "#1f6283", "#15264d")),
}
DARK: Paint = {
    **{"paper": "#111517", "raised": "#191f22", "ink": "#e9edee", "muted": "#9ca7ad", "line": "#30383c"},
    **{"accent": "#63c1cb", "warm": "#ff9673"},
    **{"codes": "#3d9aa6", "tables": "#ecc565", "factors": "#e5775a", "outliers": "#ad94da"},
    **{"transforms": "#2f5560", "dense": "#6c767c"},
    **_ramp(("#1c3137", "#22606f", "#3f9a9d", "#9ad0b4", "#f4f5d6")),
}
"""The heat ramps of LIGHT and DARK are monotone in luminance, so they also work in greyscale.

Shades of more bits contrast more with the paper.
"""
_PLACEHOLDERS: Paint = {role: f"#01{index:02x}fe" for index, role in enumerate(LIGHT)}
_ROLES = tuple(LIGHT)


def variables(paint: Paint) -> str:
    """The colours as CSS declarations."""
    return ";".join(f"--{role}:{colour}" for role, colour in paint.items())


def plain(text: str) -> str:
    """`text` with every unprintable character (control or text-direction characters) replaced by one sign."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def shortened(text: str, max_length: int) -> str:
    """`text` with its middle left out if it is longer than `max_length`."""
    text, tail = plain(text), (max_length - 1) // 2
    return text if len(text) <= max_length else f"{text[: max_length - 1 - tail]}…{text[len(text) - tail :]}"


def _save(drawing: Drawing, paint: Paint, width: int, settings: Mapping[str, Any], **options: Any) -> bytes:
    stream = io.BytesIO()
    with style.context([_SETTINGS | dict(settings)], after_reset=True):
        drawing(paint, width).savefig(stream, **options)
    return stream.getvalue()


_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


def png(drawing: Drawing) -> bytes:
    """The wide figure on white, as a PNG file."""
    return _save(drawing, LIGHT, WIDE, {}, format="png", dpi=_PNG_DPI, facecolor="white", metadata={"Software": None})


def svg(drawing: Drawing) -> bytes:
    """The wide figure on white, as an SVG file with its text as outlines, so that it looks the same everywhere."""
    settings = {"svg.fonttype": "path", "svg.hashsalt": "reallm"}
    return _save(drawing, LIGHT, WIDE, settings, format="svg", facecolor="white", metadata=_NO_METADATA)


def inline_svg(drawing: Drawing, name: str, label: str, width: int) -> str:
    """The figure as an SVG element for a page, in the page's colours and font.

    `name` prefixes all ids, so that they differ from those of other figures; screen readers read `label`.
    """
    settings = {"svg.fonttype": "none", "svg.hashsalt": name}
    data = _save(drawing, _PLACEHOLDERS, width, settings, format="svg", facecolor="none", metadata=_NO_METADATA)
    root = ElementTree.fromstring(data)
    for parent in root.iter():
        for child in [c for c in parent if _local(c.tag) in ("style", "metadata")]:
            parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(key): _themed(value, name, key) for key, value in element.attrib.items()}
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": plain(label)}
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _local(name: str) -> str:
    """A name without its namespace, which is implied within HTML."""
    return name.rpartition("}")[2]


def _themed(value: str, name: str, key: str) -> str:
    if _local(key) == "id":
        return f"{name}-{value}"
    if _local(key) == "href":
        return value.replace("#", f"#{name}-", 1)
    value = value.replace("url(#", f"url(#{name}-")
    return re.sub(r"#01([0-9a-f]{2})fe", lambda match: f"var(--{_ROLES[int(match[1], 16)]})", value)


def steps(values: Sequence[float]) -> list[int]:
    """The shade of each value, on a logarithmic scale from the smallest to the largest; values must be above zero."""
    low, high = log(min(values)), log(max(values))
    return [min(int(STEPS * (log(value) - low) / (high - low)), STEPS - 1) if high > low else 0 for value in values]
