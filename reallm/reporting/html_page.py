"""A page as one self-contained HTML file: a header, then sections, each with a sentence, a figure and its numbers.

The same content gives the same bytes. All text that comes from files (names, texts, notes) is escaped, and the page's
security policy forbids scripts and connections.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from .figures.paint import DARK, LIGHT, NARROW, WIDE, Drawing, inline_svg, plain, variables


@dataclass(frozen=True, slots=True)
class Table:
    """A table whose cells are texts; the first cell of a row is the name of the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Section:
    """One section of the page: `takeaway` says what the figure shows, `table` lists the numbers that it is drawn from.

    `name` is unique on the page. In `takeaway` and `aside`, text between backquotes is shown as code.
    """

    name: str
    title: str
    takeaway: str
    drawing: Drawing | None = None
    aside: str = ""
    table: Table | None = None


def render(template: str, sections: Sequence[Section], **context: Any) -> str:
    """The HTML text of `template` filled with `sections`; `context` has the template's other variables."""
    environment = Environment(
        loader=PackageLoader("reallm.reporting", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: plain(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = _code
    return environment.get_template(template).render(
        sections=[_section(section) for section in sections],
        light=variables(LIGHT),
        dark=variables(DARK),
        version=version("reallm"),
        **context,
    )


def _section(section: Section) -> Mapping[str, Any]:
    label = f"{section.title}. {section.takeaway}"
    figure = section.drawing and {
        kind: Markup(inline_svg(section.drawing, f"{section.name}-{kind}", label, width))
        for kind, width in (("narrow", NARROW), ("wide", WIDE))
    }
    texts = {"name": section.name, "title": section.title, "takeaway": section.takeaway, "aside": section.aside}
    return texts | {"figure": figure, "table": section.table}


def _code(text: str) -> Markup:
    """`text` escaped for HTML, with the parts between backquotes as <code> elements."""
    parts = [escape(plain(part)) for part in text.split("`")]
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else p for i, p in enumerate(parts))
