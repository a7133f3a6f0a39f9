"""Artifacts by their name on the hub, read from its cache, and artifacts that transformers loaded and saved again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from artifacts import Made, make
from safetensors.torch import load_file, save_file
from tuning import write_letters
from typer.testing import CliRunner

import reallm
from reallm.artifacts.find import find_artifact, plan_of, require_artifact
from reallm.cli.main import app
from reallm.errors import UserError
from reallm.runtime.load import load

pytestmark = pytest.mark.usefixtures("one_thread")
REVISION = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make("llama", tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def copy(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of `made`, loaded and saved by transformers, with its tokenizer."""
    folder = tmp_path_factory.mktemp("copy") / "copy"
    model, tokenizer = load(made.folder)
    model.save_pretrained(folder)
    assert tokenizer is not None
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def hub(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub that holds the artifact me/packed and the model me/plain; the network is switched off."""
    for name, folder in {"packed": made.folder, "plain": made.source}.items():
        repository = tmp_path / "hub" / f"models--me--{name}"
        shutil.copytree(folder, repository / "snapshots" / REVISION)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(REVISION)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def ran(*arguments: str | Path) -> str:
    """What a command printed that must succeed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, f"{result.stderr} {result.exception!r}"
    return result.stdout


def refused(*arguments: str | Path) -> str:
    """The one line of a command that must fail."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, f"{result.output} {result.exception!r}"
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("reallm: ")]
    return line


# -- by name on the hub ------------------------------------------------------------------------------------------------


def test_every_command_takes_an_artifact_by_its_name_on_the_hub(made: Made, hub: Path, tmp_path: Path) -> None:
    text = write_letters(tmp_path / "text.txt", 4)
    assert ran("generate", "me/packed", "abc", "--max-new-tokens", "2") == ran(
        "generate", made.folder, "abc", "--max-new-tokens", "2"
    )
    assert "me/packed is intact" in ran("verify", "me/packed")
    assert "LlamaForCausalLM" in ran("inspect", "me/packed", "--json", tmp_path / "facts.json")
    assert json.loads((tmp_path / "facts.json").read_text())["plan"]["budget"]
    assert "evaluation of me/packed" in ran("eval", "me/packed", "--text", text, "--seqlen", "16", "--windows", "1")
    assert "0 of " in ran("diff", "me/packed", made.folder)
    ran("report", "me/packed", "-o", tmp_path / "report.html")
    model, _ = reallm.load("me/packed")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert reallm.inspect("me/packed").plan == reallm.inspect(made.folder).plan == plan_of("me/packed")


def test_other_names_are_not_artifacts(made: Made, hub: Path) -> None:
    assert find_artifact("me/plain") is None and find_artifact("me/nothing") is None
    assert "me/nothing does not exist here or on the hub" in refused("verify", "me/nothing")
    assert "already compressed by reallm" in refused("measure", "me/packed", "-o", "work")
    assert find_artifact("packed") is None and find_artifact("me/plan.json") is None  # not looked for on the hub


def test_a_folder_comes_before_the_hub(made: Made, copy: Path, hub: Path, tmp_path: Path) -> None:
    shutil.copytree(copy, tmp_path / "me" / "packed")
    assert find_artifact("me/packed") == Path("me/packed")


def test_what_a_name_means_is_said_when_it_is_not_an_artifact(made: Made, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "table.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for name, expected in {
        tmp_path / "work": "is a work folder of `reallm measure`",
        tmp_path / "empty": r"has no config\.json",
        tmp_path / "none": "does not exist",
        made.source: "not a reallm artifact",
        made.folder / "plan.json": "is a file",
    }.items():
        with pytest.raises(UserError, match=expected):
            require_artifact(name)
        if name.suffix != ".json":
            assert str(name) in refused("inspect", name) and str(name) in refused("verify", name)


# -- saved by transformers ---------------------------------------------------------------------------------------------


def test_a_saved_copy_runs_and_is_described_as_the_artifact(made: Made, copy: Path, tmp_path: Path) -> None:
    text = write_letters(tmp_path / "text.txt", 4)
    assert not (copy / "plan.json").exists() and not (copy / "manifest.json").exists()
    assert ran("generate", copy, "abc", "--max-new-tokens", "2") == ran(
        "generate", made.folder, "abc", "--max-new-tokens", "2"
    )
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(reallm.load(copy)[0](ids).logits, reallm.load(made.folder)[0](ids).logits)
    here, there = reallm.inspect(copy), reallm.inspect(made.folder)
    assert here.plan is None and here.formats == there.formats and here.bits_histogram == there.bits_histogram
    assert (here.shared_bytes, here.other_bytes, here.other_tensors) == (
        there.shared_bytes,
        there.other_bytes,
        there.other_tensors,
    )
    same = {"text": text, "seqlen": 16, "windows": 1, "progress": False}
    sizes, expected = reallm.evaluate(copy, **same).sizes, reallm.evaluate(made.folder, **same).sizes
    assert (sizes.matrices_bpw, sizes.weights_bpw) == (expected.matrices_bpw, expected.weights_bpw)
    assert sizes.file_bytes == (copy / "model.safetensors").stat().st_size
    assert "saved this artifact, without its plan" in ran("inspect", copy, "--matrices")


@pytest.mark.parametrize("architecture", ["mixtral", "gpt2", "llama-tied", "roberta"])
def test_copies_of_other_kinds_are_checked_and_described(architecture: str, tmp_path: Path) -> None:
    """Experts, transposed matrices, a packed embedding with a tied head, shared codebooks."""
    made = make(architecture, tmp_path)
    load(made.folder)[0].save_pretrained(tmp_path / "copy", max_shard_size="20KB")
    report = reallm.verify(tmp_path / "copy")
    assert (report.matrices, report.hashed) == (len(made.packed.fields), False)
    assert reallm.inspect(tmp_path / "copy").formats == reallm.inspect(made.folder).formats


def test_a_copy_of_the_model_without_its_head_is_checked(tmp_path: Path) -> None:
    made = make("llama", tmp_path, lambda matrix: "int4-g16" if matrix.kind == "linear" else None)
    load(made.folder)[0].model.save_pretrained(tmp_path / "base")
    assert reallm.verify(tmp_path / "base").matrices == len(made.packed.fields) == 14


def test_verify_says_what_it_cannot_check(copy: Path) -> None:
    line = ran("verify", copy)
    assert "can be decoded" in line and "whether values were changed cannot be checked" in line
    report = reallm.verify(copy)
    assert (report.hashed, report.files, report.deep) == (False, 0, True) and report.tensors > report.matrices > 0


def change(folder: Path, name: str, value: torch.Tensor | None) -> None:
    """Replace or remove the tensor `name` in the weights of `folder`."""
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name)
    save_file(tensors if value is None else {**tensors, name: value}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("fault", ["missing", "short", "padding", "nan", "truncated", "shape"])
def test_verify_finds_what_can_be_found_without_hashes(fault: str, made: Made, copy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(copy, folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name, tensor in tensors.items() if tensor.dtype == torch.uint8 and name.endswith(".codes"))
    weights = folder / "model.safetensors"
    if fault == "missing":
        change(folder, name, None)
    elif fault == "short":
        change(folder, name, tensors[name][:-64])
    elif fault == "padding":
        padded = next(n for n, t in tensors.items() if n.endswith("scales") and t.numel() and int(t[-1]) == 0)
        raw = tensors[padded].clone()
        raw[-1] = 7
        change(folder, padded, raw)
    elif fault == "nan":
        norm = tensors["model.norm.weight"].clone()
        norm[3] = float("nan")
        change(folder, "model.norm.weight", norm)
    elif fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(UserError):
        reallm.verify(folder)
    assert "reallm: " in refused("generate", folder, "abc")


def test_what_needs_a_plan_refuses_a_copy_with_the_reason(made: Made, copy: Path, tmp_path: Path) -> None:
    for command in (["explain", copy], ["report", copy], ["diff", copy, made.folder], ["compile", copy, "-o", "out"]):
        assert "transformers saved it" in refused(*command), command
    assert "transformers saved it" in refused("finetune", copy, "-o", tmp_path / "tuned")


def test_an_artifact_without_one_of_its_records_is_not_a_copy(made: Made, tmp_path: Path) -> None:
    for name in ("manifest.json", "plan.json"):
        shutil.copytree(made.folder, tmp_path / name)
        (tmp_path / name / name).unlink()
        assert name in refused("verify", tmp_path / name) and name in refused("generate", tmp_path / name, "abc")
