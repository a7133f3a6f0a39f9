"""README and docs: a short README, no dead links, commands that the command line accepts, figures of the results."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import typer

import reallm
from reallm.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
MAX_LINES = 130
pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="needs the repository, not the wheel")

PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")] + sorted(
    (ROOT / "docs").rglob("*.md")
)
PAGE_NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
COMMANDS = typer.main.get_command(app)


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def links(text: str) -> Iterator[str]:
    """Targets of the Markdown links and images outside of fenced code."""
    prose = re.sub(r"^```(?!\{).*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from re.findall(r"\]\(([^)\s]+)\)", prose)


def command_lines(text: str) -> Iterator[str]:
    """Every `reallm ...` in code: lines of fenced blocks, and inline code that names a command with arguments."""
    for block in re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            _, found, rest = line.partition("-m reallm ")
            if line.startswith("reallm ") or found:
                yield f"reallm {rest}" if found else line
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from (code for code in re.findall(r"`(reallm \w[^`]*)`", prose))


def short_commands(text: str) -> Iterator[tuple[str, str]]:
    """(command, option) of inline code such as `plan --refit 2`, and of `finetune --train scales,norms`."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for command, rest in re.findall(r"`(?:reallm )?([a-z]+) ([^`]*--[^`]*)`", prose):
        if command in COMMANDS.commands:
            yield from ((command, option) for option in re.findall(r"(?<!\S)(--[a-z][a-z-]*|-[a-z])(?!\S)", rest))


def options_of(command: str) -> set[str]:
    parameters = COMMANDS.commands[command].params
    return {name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)} | {
        "-h",
        "--help",
    }


def test_the_readme_fits_on_a_page() -> None:
    assert len(text_of("README.md").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_every_relative_link_exists(name: str) -> None:
    folder = (ROOT / name).parent
    relative = [link for link in links(text_of(name)) if not re.match(r"[a-z]+:|#", link)]
    assert [link for link in relative if not (folder / link.partition("#")[0]).exists()] == []


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_every_file_and_module_named_exists(name: str) -> None:
    code = set(re.findall(r"`([\w./]+)`", text_of(name)))
    rooms = r"(reallm|kernels|planner|codegen|benchmarks|tests|docs|examples)/"
    files = {path for path in code if re.match(rooms, path)}
    assert [path for path in sorted(files) if "your_" not in path and not (ROOT / path).exists()] == []
    modules = [dotted for dotted in sorted(code) if re.fullmatch(r"(kernels|planner|codegen)(\.\w+)+", dotted)]
    paths = [dotted.replace(".", "/") for dotted in modules]
    assert [path for path in paths if not (ROOT / path).is_dir() and not (ROOT / f"{path}.py").exists()] == []


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_every_command_line_is_accepted(name: str) -> None:
    """Commands exist, options exist, required ones are given, values have the right type."""
    for line in command_lines(text_of(name)):
        words = shlex.split(line, comments=True)[1:]
        if len(words) == 1 and words[0] in COMMANDS.commands:
            continue  # the name of a command, such as `reallm measure`
        try:
            COMMANDS.commands[words[0]].make_context(words[0], words[1:])  # parses without running
        except Exception as error:
            error.add_note(f"{name}: {line}")
            raise


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_every_option_named_in_prose_exists(name: str) -> None:
    unknown = [
        (command, option) for command, option in short_commands(text_of(name)) if option not in options_of(command)
    ]
    assert unknown == []


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_python_examples_call_what_exists(name: str) -> None:
    """Every `reallm.f(...)` in a Python block names a public function and its parameters."""
    options = {field.name for record in (reallm.PlanOptions, reallm.FinetuneSettings) for field in fields(record)}
    for block in re.findall(r"^```python\n(.*?)^```", text_of(name), flags=re.MULTILINE | re.DOTALL):
        for call in (node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)):
            path = ast.unparse(call.func).split(".")
            if path[0] == "reallm":
                function = reduce(getattr, path[1:], reallm)
                signature = inspect.signature(function)
                parameters = set(signature.parameters)
                if any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
                    parameters |= options
                assert {keyword.arg for keyword in call.keywords} <= parameters, ast.unparse(call)


def test_the_rooms_of_reallm_are_listed_in_the_order_of_their_imports() -> None:
    tree = ast.parse((ROOT / "tests" / "test_imports.py").read_text(encoding="utf-8"))
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    (names,) = (node.value for node in assigned if ast.unparse(node.targets[0]) == "ROOMS")
    rooms = [node.value for node in ast.walk(names) if isinstance(node, ast.Constant)]
    text = text_of("docs/contributing/rooms.md")
    assert re.findall(r"^\| `reallm/(\w+)(?:/|\.py)`", text, flags=re.MULTILINE) == rooms


def results(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))
    return rows


def table_rows(text: str, header: str) -> list[list[str]]:
    """The cells of the table whose header line begins with `header`, without emphasis."""
    lines = text.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(header)) + 2
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("*", "") for cell in line.strip("|").split("|")])
    return rows


@pytest.mark.parametrize(
    ("page", "header", "peer_kl"),
    [
        ("README.md", "| bits per weight | reallm, KL", 3),
        ("docs/benchmarks/quality.md", "| bits per weight | reallm KL", 4),
    ],
)
def test_the_quality_tables_have_the_figures_of_the_results(page: str, header: str, peer_kl: int) -> None:
    found = results("quality.json")
    rows = table_rows(text_of(page), header)
    assert len(rows) >= 4
    for cells in rows:
        matching = [row for row in found if f"{row['ours_bits_per_weight']:.2f}" == cells[0]]
        assert cells[1] in {f"{row['ours']:.3f}" for row in matching}, cells
        if cells[2]:
            peers = {(f"{row['peer']:.3f}", f"{row['ratio']:.2f}"): row["peer_name"] for row in matching}
            peer = peers[cells[peer_kl], cells[peer_kl + 1]]
            assert cells[2].split()[0].rstrip(",") == peer.split()[0]


def test_the_picture_is_drawn_from_the_results() -> None:
    """Every label of the picture is a method of quality.json: `python -m benchmarks.draw_quality_figure` draws it."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("draw_quality_figure", ROOT / "benchmarks" / "draw_quality_figure.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    figure = module.draw(results("quality.json"))
    (axes,) = figure.axes
    curve = max(axes.lines, key=lambda line: len(line.get_xdata()))
    assert sorted(curve.get_ydata()) == sorted({row["ours"] for row in results("quality.json")})
    peers = {row["peer_name"] for row in results("quality.json")} & set(module.peers(results("quality.json")))
    assert len(axes.lines) == 1 + len(peers) >= 11
    assert (ROOT / "docs" / "_static" / "quality.svg").exists()
