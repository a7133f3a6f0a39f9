"""Labelled sentences for `make bench NAME=encoder`: which part of Python's standard library a sentence documents.

The sentences come from the docstrings and comments of the library of the running Python, read as source text and not
imported. The names of the modules are removed from them, so that a class cannot be told by a single word.
"""

from __future__ import annotations

import ast
import hashlib
import io
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CLASSES: dict[str, tuple[str, ...]] = {
    "asyncio": ("asyncio",),
    "email": ("email", "mailbox", "smtplib", "imaplib", "poplib"),
    "unittest": ("unittest", "doctest"),
    "logging": ("logging",),
    "xml": ("xml",),
    "web": ("http", "urllib", "wsgiref", "socketserver", "ssl", "ftplib", "xmlrpc"),
    "numbers": ("decimal", "_pydecimal", "fractions", "statistics", "random", "numbers"),
    "windows on screen": ("tkinter", "turtle", "idlelib"),
}
PER_CLASS, HELD_OUT = 40, 50
"""Training and held-out sentences of each class."""


@dataclass(frozen=True)
class Sentences:
    """Sentences with the number of their class."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]


def load_task() -> tuple[Sentences, Sentences]:
    """The training and the held-out sentences, as many of every class, in an order that their text decides."""
    parts: tuple[list[tuple[str, int]], list[tuple[str, int]]] = ([], [])
    for label, (name, modules) in enumerate(CLASSES.items()):
        found = sorted(set(_sentences(modules)), key=_digest)
        if len(found) < PER_CLASS + HELD_OUT:
            raise SystemExit(f"{name}: {len(found)} sentences in this Python's library, {PER_CLASS + HELD_OUT} needed")
        parts[0].extend((text, label) for text in found[:PER_CLASS])
        parts[1].extend((text, label) for text in found[PER_CLASS : PER_CLASS + HELD_OUT])
    ordered = [sorted(part, key=lambda pair: _digest(pair[0])) for part in parts]
    train, test = (Sentences(tuple(t for t, _ in part), tuple(n for _, n in part)) for part in ordered)
    return train, test


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _sentences(modules: tuple[str, ...]) -> Iterator[str]:
    """Sentences of 8 to 20 words from the docstrings and comments of `modules`, without the modules' names."""
    names = re.compile("|".join(rf"\b{re.escape(m)}\w*" for m in (*modules, *CLASSES)), re.IGNORECASE)
    for path in _files(modules):
        for block in _texts(path.read_text(encoding="utf-8", errors="replace")):
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", re.sub(r"\s+", " ", block)):
                plain = re.fullmatch(r"[A-Z][\w ,;:()'\"/-]*[.]", sentence)
                if plain and 8 <= len(sentence.split()) <= 20 and "__" not in sentence:
                    yield re.sub(r"\s+", " ", names.sub("it", sentence))


def _files(modules: tuple[str, ...]) -> Iterator[Path]:
    library = Path(sysconfig.get_path("stdlib"))
    for module in modules:
        folder = library / module
        yield from sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def _texts(source: str) -> Iterator[str]:
    """The docstrings of a module, and its comments, lines that follow each other joined."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from re.split(r"\n\s*\n", ast.get_docstring(node) or "")
    lines: list[str] = []
    last = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != last + 1 and lines:
                yield " ".join(lines)
                lines = []
            lines.append(token.string.lstrip("#: "))
            last = token.start[0]
    yield " ".join(lines)
