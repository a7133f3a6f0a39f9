"""English prose from every Python installation: the language reference and the docstrings of the standard library.

This technical English is good enough to try reallm without a network. Text like that which the model will be used on is
better.
"""

from __future__ import annotations

import ast
import platform
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

TEST_EVERY = 5
"""Every fifth document is reserved for evaluation."""
MIN_WORDS = 8
"""Minimum words in a paragraph of prose; shorter ones are taken for headings and signatures."""
MIN_PROSE = 0.88
"""Minimum share of letters and plain punctuation in prose; other paragraphs are taken for code or tables."""
LOCAL_MODULES = ("_sysconfigdata", "sitecustomize", "usercustomize")
"""Name prefixes of modules that differ from machine to machine and are therefore left out."""
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_RULE = re.compile(r"[-=*~^#+|_ ]+")
_MARKUP = (
    (re.compile(r":\w+:`([^`]*)`"), r"\1"),
    (re.compile(r"``?([^`]*)`?`"), r"\1"),
    (re.compile(r"\*\*?([\w.-]+)\*\*?"), r"\1"),
    (re.compile(r"\s+"), " "),
)


def offline_documents(split: str) -> tuple[tuple[str, ...], str]:
    """The documents of `split`, "train" or "test", and their description; the two splits share no paragraph.

    The same version of Python always gives the same documents in the same order.
    """
    seen: set[str] = set()
    documents = []
    for raw in (*_topics(), *_docstrings()):
        new = [paragraph for paragraph in prose(raw) if paragraph not in seen]
        seen.update(new)
        if new:
            documents.append("\n\n".join(dict.fromkeys(new)))
    test = documents[TEST_EVERY - 1 :: TEST_EVERY]
    chosen = test if split == "test" else [text for i, text in enumerate(documents, 1) if i % TEST_EVERY]
    what = f"offline default: documentation of Python {platform.python_version()}"
    return tuple(chosen), f"{what}, {split} part, {len(chosen)} documents"


def prose(raw: str) -> Iterator[str]:
    """The paragraphs of `raw` that are prose, each on one line without reStructuredText markup; no code, no tables."""
    for block in re.split(r"\n\s*\n", raw):
        lines = [line.strip() for line in block.splitlines()]
        if any(line.startswith((">>>", "...", "$ ", "| ")) for line in lines):
            continue
        text = " ".join(line for line in lines if not _RULE.fullmatch(line))
        for pattern, replacement in _MARKUP:
            text = pattern.sub(replacement, text)
        text = text.strip()
        letters = sum(character.isalpha() or character in " ,.'" for character in text)
        if len(text.split()) >= MIN_WORDS and letters >= MIN_PROSE * len(text):
            yield text


def _topics() -> Iterator[str]:
    """The sections of the language reference that `help()` shows."""
    for name in sorted(topics):
        yield topics[name]


def _docstrings() -> Iterator[str]:
    """The docstrings of each top-level module of the standard library; modules are parsed, not imported."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"), key=lambda path: path.name):
        if path.name.startswith(LOCAL_MODULES):
            continue
        nodes = (node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, _DOCUMENTED))
        yield "\n\n".join(ast.get_docstring(node) or "" for node in nodes)
