"""Adapters inside an artifact: added and removed without a change to it, taken by name, listed, checked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import make
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner, Result

from reallm.artifacts.adapter_layout import ARTIFACT_KEY, CONFIG_FILE, LEFT, PREFIX, RIGHT, WEIGHTS_FILE
from reallm.artifacts.bundled_adapters import find_adapter
from reallm.artifacts.directory import new_artifact
from reallm.artifacts.inspect import inspect
from reallm.artifacts.manifest import MANIFEST_FILE
from reallm.artifacts.peft_files import write_adapter
from reallm.artifacts.verify import verify
from reallm.cli.main import app
from reallm.errors import UserError
from reallm.models.loaded import Matrix
from reallm.runtime.load import load

IDS = torch.arange(12)[None]
QUERY, HEAD = "model.layers.0.self_attn.q_proj", "lm_head"


def linears(matrix: Matrix) -> str | None:
    return "int4-g16" if matrix.kind == "linear" else None


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("made"), linears).folder


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def add(artifact: Path, name: str, seed: int = 0, dora: bool = False) -> Path:
    """An adapter of one packed and one plain matrix, inside `artifact`."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=generator)

    factors = {QUERY: (numbers(48, 3), numbers(3, 48)), HEAD: (numbers(261, 2), numbers(2, 48))}
    magnitudes = {QUERY: 1 + numbers(48), HEAD: 1 + numbers(261)} if dora else None
    return write_adapter(artifact / "adapters" / name, factors, artifact, magnitudes=magnitudes)


@torch.no_grad()
def logits(artifact: Path, adapter: Path | str | None) -> Tensor:
    model, _ = load(artifact, dtype=torch.float32, adapter=adapter)
    result: Tensor = model(input_ids=IDS).logits
    return result


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_adding_one_changes_nothing_of_the_artifact(artifact: Path, made: Path) -> None:
    bare = verify(artifact)
    add(artifact, "chat")
    assert (artifact / MANIFEST_FILE).read_bytes() == (made / MANIFEST_FILE).read_bytes()
    found = verify(artifact)
    assert (found.files, found.tensors, found.file_bytes) == (bare.files, bare.tensors, bare.file_bytes)
    assert bare.adapters == () and [view.name for view in found.adapters] == ["chat"]
    torch.testing.assert_close(logits(artifact, None), logits(made, None), rtol=0, atol=0)


def test_adapters_are_switched_by_name(artifact: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for seed, name in enumerate(("chat", "code")):
        folder = add(artifact, name, seed, dora=name == "code")
        torch.testing.assert_close(logits(artifact, name), logits(artifact, folder), rtol=0, atol=0)
    chat, code, plain = (logits(artifact, name) for name in ("chat", "code", None))
    assert all(float((one - two).abs().max()) > 0.1 for one, two in ((chat, code), (chat, plain), (code, plain)))
    (tmp_path / "chat").mkdir()  # not the one that is meant
    monkeypatch.chdir(tmp_path)
    torch.testing.assert_close(logits(artifact, "chat"), chat, rtol=0, atol=0)
    with pytest.raises(UserError, match="chat is not an adapter"):
        load(artifact, adapter="./chat")


def test_an_unknown_name_lists_those_that_are_there(artifact: Path) -> None:
    with pytest.raises(UserError, match=f"no adapter 'other': .* inside {artifact} are: none$"):
        load(artifact, adapter="other")
    add(artifact, "code")
    add(artifact, "chat")
    refused = run("generate", artifact, "abc", "--adapter", "other")
    assert refused.exit_code == 2
    assert [line for line in refused.stderr.splitlines() if line.startswith("reallm: ")] == [
        f"reallm: there is no adapter 'other': it is not a folder, and the adapters inside {artifact} are: chat, code"
    ]


def test_a_model_is_evaluated_with_one(artifact: Path, tmp_path: Path) -> None:
    add(artifact, "chat")
    (tmp_path / "test.txt").write_text("abc " * 200)
    options = ("--text", tmp_path / "test.txt", "--seqlen", "32", "--windows", "2", "--against", artifact)
    plain = run("eval", artifact, *options)
    shown = run("eval", artifact, *options, "--adapter", "chat", "--json", tmp_path / "eval.json")
    assert plain.exit_code == shown.exit_code == 0
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["comparison"]["divergence"]["mean"] > 0.01  # from the artifact without it
    assert "with the adapter chat" in shown.stdout and "adapter" not in plain.stdout
    refused = run("eval", artifact, *options, "--adapter", "other")
    assert refused.exit_code == 2 and "there is no adapter 'other'" in refused.stderr


def test_commands_list_them(artifact: Path, tmp_path: Path) -> None:
    add(artifact, "chat")
    add(artifact, "code", dora=True)
    checked = run("verify", artifact, "--json", tmp_path / "report.json")
    assert checked.exit_code == 0
    assert "adapter chat is intact: LoRA of rank 3, 2 matrices" in checked.stdout
    assert "adapter code is intact: DoRA of rank 3, 2 matrices" in checked.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert [view["name"] for view in report["adapters"]] == ["chat", "code"]
    shown = run("inspect", artifact)
    assert shown.exit_code == 0 and "code: DoRA of rank 3, 2 matrices" in shown.stdout
    text = run("generate", artifact, "abc", "--adapter", "chat", "--max-new-tokens", "5")
    assert text.exit_code == 0 and text.stdout.startswith("abc")
    assert (
        text.stdout
        == run("generate", artifact, "abc", "--adapter", artifact / "adapters/chat", "--max-new-tokens", "5").stdout
    )


def spoil(folder: Path, config: Mapping[str, Any] | None = None, **tensors: Tensor) -> None:
    """Change an adapter's configuration or add tensors to it; one of size 0 removes."""
    if config is not None:
        old = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps(old | config))
    held = {n: t for n, t in (load_file(folder / WEIGHTS_FILE) | tensors).items() if t.numel()}
    save_file(held, folder / WEIGHTS_FILE)  # which names no artifact, as PEFT's do not


@pytest.mark.parametrize("damage", ["cut off", "another artifact", "another model", "no linear", "type", "stranger"])
def test_one_that_cannot_be_used_is_named_and_stops_nobody_else(artifact: Path, damage: str) -> None:
    add(artifact, "chat")
    folder = add(artifact, "worse", seed=1)
    tensor, gone = PREFIX + QUERY, torch.zeros(0)
    if damage == "cut off":
        (folder / WEIGHTS_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes()[:-1])
        message = "worse/adapter_model.safetensors cannot be read"
    elif damage == "another artifact":
        content = (folder / WEIGHTS_FILE).read_bytes()
        at = content.index(b'"', content.index(ARTIFACT_KEY.encode()) + len(ARTIFACT_KEY) + 2) + 1
        (folder / WEIGHTS_FILE).write_bytes(content[:at] + b"0123456789abcdef" + content[at + 16 :])
        message = "worse was trained on another artifact than"
    elif damage == "another model":
        spoil(folder, **{tensor + LEFT: torch.zeros(47, 3)})
        message = rf"another model: {QUERY} is \[48, 48\] in .*, not \[47, 48\]"
    elif damage == "no linear":
        spoil(folder, **{f"{PREFIX}x{LEFT}": torch.zeros(4, 1), f"{PREFIX}x{RIGHT}": torch.zeros(1, 4)})
        message = "another model: x is not a linear module in"
    elif damage == "type":
        spoil(folder, {"peft_type": "IA3"}, **{tensor + LEFT: gone})
        message = "worse is a PEFT adapter of type IA3"
    else:
        shutil.rmtree(folder)
        folder.mkdir()
        message = "worse is not an adapter: it has no readable adapter_config.json"
    with pytest.raises(UserError, match=message):
        verify(artifact, deep=False)
    with pytest.raises(UserError):
        load(artifact, adapter="worse")
    first, second = inspect(artifact).adapters
    assert first.fault is None and second.fault is not None and second.name == "worse"
    shown = run("inspect", artifact)
    assert shown.exit_code == 0 and "worse cannot be used" in shown.stdout
    logits(artifact, None)
    logits(artifact, "chat")


def test_values_are_read_by_the_deep_check_alone(artifact: Path) -> None:
    spoil(add(artifact, "chat"), **{PREFIX + QUERY + LEFT: torch.full((48, 3), torch.nan)})
    assert verify(artifact, deep=False).adapters[0].fault is None
    with pytest.raises(UserError, match=f"chat/adapter_model.safetensors: {QUERY} holds NaN or infinity"):
        verify(artifact)


def test_a_file_among_them_is_refused_and_a_run_in_progress_is_not(artifact: Path) -> None:
    add(artifact, "chat")
    (artifact / "adapters" / "code.partial").mkdir()
    (artifact / "adapters" / ".code.17.partial").mkdir()
    assert [view.name for view in verify(artifact).adapters] == ["chat"]
    (artifact / "adapters" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"adapters/notes.txt is not the folder of an adapter; remove it"):
        verify(artifact)


def test_an_artifact_that_holds_adapters_is_not_replaced(artifact: Path) -> None:
    folder = add(artifact, "chat")
    with (
        pytest.raises(UserError, match=r"holds the adapters chat, .*; move or remove .*/adapters first"),
        new_artifact(artifact, force=True),
    ):
        pass
    assert add(artifact, "code").exists() and folder.exists()
    with new_artifact(folder, force=True, mark=CONFIG_FILE) as fresh:  # an adapter itself is replaced as ever
        (fresh / CONFIG_FILE).write_text("{}")


def test_a_folder_is_found_where_no_name_is(artifact: Path, tmp_path: Path) -> None:
    inside = add(artifact, "chat")
    outside = Path(shutil.copytree(inside, tmp_path / "elsewhere"))
    assert find_adapter(artifact, "chat") == inside and find_adapter(artifact, outside) == outside
    assert find_adapter(artifact, str(inside)) == inside


def test_the_command_trains_one_into_its_place(artifact: Path, made: Path, tmp_path: Path) -> None:
    text = tmp_path / "train.txt"
    text.write_text("abcdefgh ." * 40)
    place = artifact / "adapters" / "chat"
    options = ["--adapter", "-o", place, "--text", text, "--teacher", made.parent / "model"]
    done = run("finetune", artifact, *options, "--steps", 5, "--seqlen", 32, "--rank", 2, "--learning-rate", 1e-2)
    assert done.exit_code == 0, done.output
    assert f"next: reallm generate {artifact} --adapter chat" in done.stderr
    assert [view.name for view in verify(artifact).adapters] == ["chat"]
    assert sorted(path.name for path in place.parent.iterdir()) == ["chat"]
    assert float((logits(artifact, "chat") - logits(artifact, None)).abs().max()) > 1e-3
