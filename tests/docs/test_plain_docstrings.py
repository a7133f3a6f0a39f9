"""Plain-text docstrings become reStructuredText that says the same."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

EXTENSION = Path(__file__).resolve().parents[2] / "docs" / "_ext" / "plain_docstrings.py"
pytestmark = pytest.mark.skipif(not EXTENSION.exists(), reason="needs the repository, not the wheel")


@pytest.fixture(scope="module")
def extension() -> Any:
    spec = spec_from_file_location("plain_docstrings", EXTENSION)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def converted(extension: Any, text: str) -> str:
    return "\n".join(extension.as_rst(text.splitlines()))


def test_code_is_literal_and_markup_characters_are_text(extension: Any) -> None:
    assert converted(extension, "`a*b` of *x* and |y| and z_") == r"``a*b`` of \*x\* and \|y\| and z\_"


def test_an_unbalanced_backtick_is_text(extension: Any) -> None:
    assert converted(extension, "a ` b") == r"a \` b"


def test_an_indented_block_is_literal(extension: Any) -> None:
    assert converted(extension, "Costs:\n\n    tr(E H E^T) * 2\n\nAfter.") == (
        "Costs:\n\n::\n\n    tr(E H E^T) * 2\n\nAfter."
    )


def test_an_indented_block_right_after_text_is_set_apart(extension: Any) -> None:
    assert converted(extension, "Costs:\n    a * b\nAfter.") == "Costs:\n\n::\n\n    a * b\n\nAfter."


def test_sections_keep_their_structure_and_examples_their_text(extension: Any) -> None:
    text = "Do it.\n\nParameters\n----------\nx\n    The *value*.\n\nExamples\n--------\n>>> f('a*b')\n'a*b'"
    assert converted(extension, text) == text.replace("*value*", r"\*value\*")


def test_a_list_begins_a_paragraph_of_its_own(extension: Any) -> None:
    assert converted(extension, "Parts:\n- one\n- two") == "Parts:\n\n- one\n- two"


def test_the_documentation_lists_every_public_name() -> None:
    import reallm

    pages = EXTENSION.parents[1] / "reference"
    text = "".join(page.read_text(encoding="utf-8") for page in pages.glob("*.md"))
    missing = [name for name in reallm.__all__ if f":: {name}\n" not in text]
    assert not missing
