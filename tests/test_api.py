"""The public names of `reallm`: documented, with an example that runs."""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path

import pytest
from tiny import save_tiny

import reallm

STAGES = ("measure", "plan", "sweep", "explain", "refit", "report", "compile", "inspect", "verify", "load", "generate")
STAGES += ("evaluate", "finetune", "compress", "export")
"""In this order, as each example uses what earlier ones left in the folder."""
TYPES = tuple(name for name in reallm.__all__ if inspect.isclass(getattr(reallm, name)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples start from: a tiny model in `model/`, `train.txt`, `test.txt` and `space.yaml`."""
    folder = tmp_path_factory.mktemp("api")
    save_tiny("llama", folder / "model")
    for name, sentence in (("train.txt", "a bad cab, a fab bag. "), ("test.txt", "he had a head bag. ")):
        (folder / name).write_text(sentence * 200, encoding="utf-8")
    (folder / "space.yaml").write_text("linear: [int4-g16, int8-g16, tq3-l8+rot]\n", encoding="utf-8")
    return folder


def test_every_public_name_is_there_and_documented() -> None:
    assert set(STAGES) | set(TYPES) == set(reallm.__all__)
    for name in reallm.__all__:
        assert inspect.getdoc(getattr(reallm, name)), name


@pytest.mark.parametrize("name", STAGES)
def test_every_parameter_of_a_stage_is_documented(name: str) -> None:
    function = getattr(reallm, name)
    documentation = inspect.getdoc(function) or ""
    missing = [parameter for parameter in inspect.signature(function).parameters if parameter not in documentation]
    assert not missing


def test_examples_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage's and type's example, one after the other in one folder."""
    monkeypatch.chdir(folder)
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    globs = {"reallm": reallm}
    for name in (*STAGES, *TYPES):
        (example,) = finder.find(getattr(reallm, name), name, globs=globs)
        assert example.examples or issubclass_of_error(name), f"reallm.{name} has no example"
        runner.run(example, clear_globs=False)
        globs |= example.globs
    assert not runner.failures


def issubclass_of_error(name: str) -> bool:
    """Errors need no example."""
    return inspect.isclass(getattr(reallm, name)) and issubclass(getattr(reallm, name), Exception)
