"""Plain English: no docstring, comment, message or document uses a phrase of banned_phrases.txt."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PHRASES = Path(__file__).with_name("banned_phrases.txt")
CODE = ("reallm", "planner", "codegen", "kernels", "benchmarks", "examples")
DOCUMENTS = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")
FIRST_WORDS = "[first words of docstrings]"
TEMPLATES = (
    "codegen/triton/",
    "codegen/cpu/linear.py",
    "codegen/decode_step/emit_cpp.py",
)
"""Where string constants are pieces of generated code, which may not change."""
pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="needs the repository, not the wheel")


@dataclass(frozen=True)
class Passage:
    """A piece of prose and where it begins."""

    file: str
    line: int
    text: str
    is_docstring: bool = False


@dataclass(frozen=True)
class Phrase:
    """A phrase to avoid and what to write instead."""

    pattern: re.Pattern[str]
    advice: str
    first_words: bool


def read_phrases() -> list[Phrase]:
    """The entries of banned_phrases.txt. Raises ValueError for a line without advice."""
    phrases, first_words = [], False
    for line in PHRASES.read_text(encoding="utf-8").splitlines():
        if line == FIRST_WORDS:
            first_words = True
        elif line.strip() and not line.startswith("#"):
            pattern, arrow, advice = line.rpartition(" => ")
            if not arrow:
                raise ValueError(f"{PHRASES.name}: {line!r} has no advice")
            phrases.append(Phrase(re.compile(pattern, re.IGNORECASE), advice, first_words))
    return phrases


def python_passages(path: Path) -> Iterator[Passage]:
    """Docstrings, comments, and string constants that hold a space, of one file."""
    source, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    template = name.startswith(TEMPLATES)
    for text, line, is_docstring in _strings(tree, docstrings):
        if is_docstring or (not template and " " in text.strip()):
            yield Passage(name, line, text, is_docstring)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield Passage(name, token.start[0], token.string.lstrip("# "))


def _strings(node: ast.AST, docstrings: set[int]) -> Iterator[tuple[str, int, bool]]:
    """(text, line, is a docstring) of every string under `node`; values in f-strings become "X"."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Constant):
            if isinstance(child.value, str):
                yield child.value, child.lineno, id(child) in docstrings
        elif isinstance(child, ast.JoinedStr):
            pieces = [str(p.value) if isinstance(p, ast.Constant) else "X" for p in child.values]
            yield "".join(pieces), child.lineno, False
            for piece in child.values:
                if isinstance(piece, ast.FormattedValue):
                    yield from _strings(piece.value, docstrings)
        else:
            yield from _strings(child, docstrings)


def markdown_passages(path: Path) -> Iterator[Passage]:
    """The text of a document by paragraphs, without fenced code."""
    name, fenced, start, lines = path.relative_to(ROOT).as_posix(), False, 1, []
    for number, line in enumerate([*path.read_text(encoding="utf-8").splitlines(), ""], 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and line.strip():
            start = start if lines else number
            lines.append(line)
            continue
        if lines:
            yield Passage(name, start, "\n".join(lines))
            lines = []


def findings(passage: Passage, phrases: list[Phrase]) -> Iterator[str]:
    """One line per phrase found in a passage: file, line, the words, the advice."""
    text = re.sub(r"`[^`\n]*`", lambda match: "`" + "x" * (len(match[0]) - 2) + "`", passage.text)
    for phrase in phrases:
        if phrase.first_words:
            match = phrase.pattern.match(text.lstrip()) if passage.is_docstring else None
        else:
            match = _search(phrase.pattern, text)
        if match:
            line = passage.line + text.count("\n", 0, match.start())
            yield f"{passage.file}:{line}: {' '.join(match[0].split())!r}: write {phrase.advice}"


def _search(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """The first match, with line breaks and indentation taken as one space (the offsets stay those of `text`)."""
    return pattern.search(re.sub(r"\s", " ", re.sub(r"(?<=\n) +", lambda m: "\0" * len(m[0]), text)).replace("\0", ""))


def passages() -> Iterator[Passage]:
    """All prose that the phrases concern."""
    for folder in CODE:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not any(parent.is_symlink() for parent in path.parents):
                yield from python_passages(path)
    for name in DOCUMENTS:
        yield from markdown_passages(ROOT / name)
    for path in sorted((ROOT / "docs").rglob("*.md")):
        yield from markdown_passages(path)


def test_no_banned_phrase_is_used() -> None:
    phrases = read_phrases()
    found = [line for passage in passages() for line in findings(passage, phrases)]
    assert not found, f"{len(found)} banned phrases; see tests/docs/banned_phrases.txt\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("The folder is no artifact.", 1),
        ("There is no GPU, and the model is no longer in memory; it is no larger.", 0),
        ("loses .3 nats", 1),
        ("loses 0.3 nats in version 1.3.2", 0),
        ("reads it\n    anew", 1),
        ("`codes anew` is not prose", 0),
        ("two bits a weight", 1),
        ("two bits per weight", 0),
    ],
)
def test_phrases_match_what_they_are_meant_for(text: str, count: int) -> None:
    assert len(list(findings(Passage("file", 1, text), read_phrases()))) == count


def test_docstrings_that_begin_with_a_fragment_are_found() -> None:
    passage = Passage("file", 1, "Of each stack of experts.", is_docstring=True)
    assert len(list(findings(passage, read_phrases()))) == 1


def test_prose_is_found_wherever_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    file = tmp_path / "module.py"
    file.write_text(
        '"""Docstring."""\n\nX = 1  # comment\n"""Attribute."""\nraise ValueError(f"a {X} message {X:.3f}")\n'
    )
    texts = {passage.text for passage in python_passages(file)}
    assert texts == {"Docstring.", "comment", "Attribute.", "a X message X"}
    page = tmp_path / "page.md"
    page.write_text("One\ntwo\n\n```\ncode\n```\nthree\n")
    assert [(p.line, p.text) for p in markdown_passages(page)] == [(1, "One\ntwo"), (7, "three")]
