"""What each command imports: commands that need no torch start in well under a second only if nothing imports it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from artifacts import make
from strategies import make_table

import reallm
from reallm.artifacts.peft_files import write_adapter
from reallm.cli.app import COMMAND_ORDER
from reallm.codegen.cpu.compiler import find_compiler
from reallm.planner.tables.measured_table import TABLE_FILE
from reallm.planner.tables.records import write_record
from reallm.runtime import prepared
from reallm.runtime.generate_loaded import prepare_first_text

HEAVY = (
    *("torch", "transformers", "tokenizers", "gguf", "datasets", "accelerate", "triton", "huggingface_hub"),
    *("matplotlib", "jinja2", "pulp", "highspy", "scipy", "pandas", "networkx", "sympy", "ray"),
)
"""Packages that take from 0.03 to 3 seconds to import."""
COSTS = {"int4-g64": 0.1, "int8-g64": 0.001}
MATRICES = [(f"layers.{n}.up", 64, 64, "linear", {f: cost * (1 + n) for f, cost in COSTS.items()}) for n in range(3)]
REPORT = """
import json, sys
from typer.testing import CliRunner
from reallm.cli.main import app
commands, heavy = json.loads(sys.argv[1])
results = []
for command in commands:
    result = CliRunner().invoke(app, command)
    results.append([result.exit_code, [name for name in heavy if name in sys.modules], result.output])
print(json.dumps(results))
"""


def imported_by(commands: Sequence[Sequence[str | Path]], heavy: Sequence[str] = HEAVY) -> list[list[str]]:
    """Which of `heavy` are imported after each of `commands`, run one after another in a new interpreter."""
    given = json.dumps([[[str(part) for part in command] for command in commands], heavy])
    process = subprocess.run([sys.executable, "-c", REPORT, given], capture_output=True, text=True, check=True)
    results = json.loads(process.stdout.splitlines()[-1])
    for command, (code, _, output) in zip(commands, results, strict=True):
        assert code == 0, f"{command}: {output}"
    return [modules for _, modules, _ in results]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny artifact in one format, with GPU kernels and with a LoRA and a DoRA adapter."""
    folder = make("llama", tmp_path_factory.mktemp("made"), lambda matrix: "int4-g16", kernels=True).folder
    name = "model.layers.0.self_attn.q_proj"
    factors = {name: (torch.ones(48, 3), torch.ones(3, 48))}
    write_adapter(folder / "adapters" / "lora", factors, folder)
    write_adapter(folder / "adapters" / "dora", factors, folder, magnitudes={name: torch.ones(48)})
    return folder


def test_help_of_every_command_imports_nothing_heavy() -> None:
    commands = [["--version"], ["--help"], *([name, "--help"] for name in COMMAND_ORDER)]
    assert imported_by(commands) == [[]] * len(commands)


def test_planning_inspecting_and_verifying_import_nothing_heavy(artifact: Path, tmp_path: Path) -> None:
    write_record(tmp_path / TABLE_FILE, make_table(*MATRICES))
    one, two, page = tmp_path / "one.json", tmp_path / "two.json", tmp_path / "report.html"
    budgets = ["--from", "5bpw", "--to", "8bpw", "--points", "4"]
    commands: list[list[str | Path]] = [
        ["plan", tmp_path, "--budget", "5bpw", "-o", one],
        ["plan", tmp_path, "--budget", "7bpw", "--best", "2", "-o", two],
        ["diff", one, two],
        ["explain", one],
        ["explain", one, "up"],
        ["sweep", tmp_path, *budgets, "-o", tmp_path / "sweep.csv"],
        ["inspect", one],
        ["inspect", artifact, "--matrices", "--json", tmp_path / "inspect.json"],
        ["verify", artifact, "--json", tmp_path / "verify.json"],
    ]
    drawing: list[list[str | Path]] = [
        ["report", one, "-o", page],
        ["sweep", tmp_path, *budgets, "--figure", tmp_path / "sweep.png"],
    ]
    *plain, report, sweep = imported_by([*commands, *drawing])
    assert plain == [[]] * len(commands)
    assert report == sweep == ["matplotlib", "jinja2"]  # a figure needs matplotlib: the check sees what is imported


def test_import_of_the_package_is_light_and_names_everything() -> None:
    code = "import json, sys, reallm; print(json.dumps([dir(reallm), sorted(sys.modules)]))"
    names, modules = json.loads(subprocess.check_output([sys.executable, "-c", code], text=True))
    assert set(reallm.__all__) <= set(names)
    assert not {*HEAVY, "numpy", "pydantic", "typer"} & set(modules)


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler here")
def test_the_first_text_after_compile_imports_no_transformers_and_builds_nothing(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prepare_first_text(artifact)
    expected = reallm.generate(artifact, "a bad", max_new_tokens=4)
    result = generated(artifact, {"CXX": str(compiler_that_only_tells_its_version(tmp_path))})
    assert result["text"] == expected and result["modules"] == ["torch", "tokenizers"]
    place = prepared._place(artifact)
    assert place is not None
    place.unlink()
    result = generated(artifact, {})  # the check sees what is imported, and the same text comes out
    assert result["text"] == expected and "transformers" in result["modules"] and place.exists()


def generated(artifact: Path, environment: Mapping[str, str]) -> dict[str, object]:
    """What a new interpreter generates, and which of HEAVY it imports."""
    code = (
        "import json, sys, reallm\ntext = reallm.generate(sys.argv[1], 'a bad', max_new_tokens=4)\n"
        "heavy = [name for name in (*sys.argv[2:], 'torch._dynamo') if name in sys.modules]\n"
        "print(json.dumps({'text': text, 'modules': heavy}))"
    )
    command = [sys.executable, "-c", code, str(artifact), *HEAVY]
    output = subprocess.check_output(command, text=True, env=os.environ | dict(environment))
    result: dict[str, object] = json.loads(output.splitlines()[-1])
    return result


def compiler_that_only_tells_its_version(folder: Path) -> Path:
    """A compiler that fails to compile; libraries that were built with the real one are found as before."""
    script = folder / "only-version"
    real = shutil.which(str(find_compiler()))
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec {real} --version\nexit 1\n')
    script.chmod(0o755)
    return script
