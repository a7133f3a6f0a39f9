"""The imports between reallm's modules, read from the sources: nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).resolve().parents[2]
INNER = ("kernels", "planner", "codegen")
"""Folders of the root that are linked into the package."""


def source_files() -> Iterator[tuple[str, Path]]:
    """(dotted module name, file) of every module of the package; a linked folder is read under its own path."""
    for top in ("reallm", *INNER):
        for file in sorted((ROOT / top).rglob("*.py")):
            parts = list(file.relative_to(ROOT).with_suffix("").parts)
            if top == "reallm" and parts[1] in INNER:
                continue
            parts = parts if top == "reallm" else ["reallm", *parts]
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


def imported_names(file: Path, module: str) -> set[str]:
    """Absolute names of everything that `file` imports anywhere, under TYPE_CHECKING and inside functions included."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            names.update(f"{source}.{alias.name}" for alias in node.names)
    return names


def module_graph() -> nx.DiGraph[str]:
    """An edge from each module to each module of the package that it imports."""
    modules = dict(source_files())
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(modules)
    for module, file in modules.items():
        for name in imported_names(file, module):
            target = name if name in modules else name.rpartition(".")[0]
            if target in modules and target != module:
                graph.add_edge(module, target)
    return graph


def room(module: str) -> str:
    """The folder of a module, such as `kernels.formats` or `codecs`; "" for the modules above the rooms."""
    parts = module.split(".")[1:]
    depth = 2 if parts and parts[0] in INNER else 1
    return ".".join(parts[:depth]) if len(parts) >= depth else ""
