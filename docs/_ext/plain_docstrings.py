"""A Sphinx extension that lets plain-text docstrings pass for reStructuredText.

Docstrings in this project are plain text: `code` in single backticks, formulas and examples as indented blocks. This
hook runs before numpydoc. It turns indented blocks into literal blocks, writes single backticks as double ones, and
escapes the characters that reStructuredText would take as markup.
"""

from __future__ import annotations

import re
from typing import Any

_SPECIAL = re.compile(r"([\\*|]|_(?!\w))")
_UNDERLINE = re.compile(r"^(-{3,}|={3,}|~{3,})$")
_LIST_ITEM = re.compile(r"^\s*([-+]|\d+\.)\s")


def setup(app: Any) -> dict[str, Any]:
    """Connect the hook; called by Sphinx."""
    app.connect("autodoc-process-docstring", _process, priority=100)
    return {"version": "1", "parallel_read_safe": True}


def _process(app: Any, what: str, name: str, target: Any, options: Any, lines: list[str]) -> None:
    lines[:] = as_rst(lines)


def as_rst(lines: list[str]) -> list[str]:
    """The lines of a docstring as reStructuredText.

    A docstring with numpydoc sections keeps its structure; only its text outside of examples is escaped.
    """
    sections = any(_UNDERLINE.match(line.strip()) for line in lines)
    result: list[str] = []
    literal = False
    for index, line in enumerate(lines):
        indented, before = line.startswith("    "), lines[index - 1].strip() if index else ""
        if not line.strip():
            result.append("")
        elif line.lstrip().startswith(">>>") or (literal and sections and before):
            literal = True
            result.append(line)
        elif indented and not sections:
            if not literal:
                if before:
                    result.append("")
                result += ["::", ""]
                literal = True
            result.append(line)
        else:
            if literal and before and not sections:
                result.append("")
            if _LIST_ITEM.match(line) and before and not _LIST_ITEM.match(lines[index - 1]) and not sections:
                result.append("")
            literal = False
            result.append(line if _UNDERLINE.match(line.strip()) else _escaped(line))
    return result


def _escaped(line: str) -> str:
    """Text with `code` in double backticks, everything else without meaning to reStructuredText."""
    parts = line.split("`")
    if len(parts) % 2 == 0 or "``" in line:
        return _SPECIAL.sub(r"\\\1", line).replace("`", r"\`")
    return "".join(f"``{part}``" if index % 2 else _SPECIAL.sub(r"\\\1", part) for index, part in enumerate(parts))
