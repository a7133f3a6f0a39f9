"""The second text of an artifact: the same as through transformers, from what the first one kept."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import Made, make
from tiny import POSITIONS, VOCAB
from torch import Tensor

import reallm
from reallm.codegen.cpu import compiler as native
from reallm.errors import UserError
from reallm.kernels.storage.layout import CONFIG_FILE
from reallm.runtime import generate_loaded, generate_prepared, prepared
from reallm.runtime.generate_loaded import prepare_first_text
from reallm.runtime.step.skeleton import Rotary

pytestmark = pytest.mark.skipif(native.find_compiler() is None, reason="no C++ compiler here")
ARCHITECTURES = ("llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")
PROMPTS = ("a bad", "x" * 40)


@pytest.fixture(autouse=True)
def kept(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of what is kept; compiled libraries stay in the usual cache folder."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(prepared, "cache_folder", lambda: folder)
    return folder / "prepared"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make("llama", tmp_path_factory.mktemp("llama"))


def forbid_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `generate` fail where it would load the model with transformers."""

    def refuse(*_: Any, **__: Any) -> str:
        raise AssertionError("the model was loaded by transformers")

    monkeypatch.setattr(generate_loaded, "continue_text", refuse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_second_text_is_that_of_the_first_way(
    architecture: str, dtype: torch.dtype, tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(architecture, tmp_path, dtype=dtype)
    texts = []
    for prompt in PROMPTS:
        texts.append(reallm.generate(made.folder, prompt, max_new_tokens=12))
        for file in kept.glob("*"):
            file.unlink()
    reallm.generate(made.folder, PROMPTS[0], max_new_tokens=1)
    assert len(list(kept.glob("*.json"))) == 1
    forbid_loading(monkeypatch)
    assert [reallm.generate(made.folder, prompt, max_new_tokens=12) for prompt in PROMPTS] == texts
    assert [reallm.generate(made.folder, prompt, max_new_tokens=1) for prompt in PROMPTS] != texts


def test_other_ways_of_generating_load_the_model(llama: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    reallm.generate(llama.folder, "a", max_new_tokens=1)
    forbid_loading(monkeypatch)
    for options in ({"temperature": 1.0}, {"dtype": "float32"}, {"chat": True}, {"device": "cuda"}):
        with pytest.raises(AssertionError, match="was loaded"):
            reallm.generate(llama.folder, "a", max_new_tokens=1, **options)


def test_a_text_ends_at_the_last_token_and_where_positions_end(
    llama: Made, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reallm.generate(llama.folder, "a bad", max_new_tokens=1)
    facts = prepared.prepared_model(llama.folder)
    assert facts is not None and facts.positions == POSITIONS and facts.vocabulary == VOCAB
    texts: list[list[int]] = []
    decode = generate_prepared._decode
    monkeypatch.setattr(generate_prepared, "_decode", lambda *given: texts.append(decode(*given)) or texts[-1])

    def ending(*ends: int) -> None:
        changed = facts.model_copy(update={"ends": ends})
        monkeypatch.setattr(generate_prepared, "prepared_model", lambda folder: changed)

    ending(-1)
    reallm.generate(llama.folder, "a bad", max_new_tokens=8)
    ending(VOCAB, texts[0][7])
    reallm.generate(llama.folder, "a bad", max_new_tokens=8)
    assert len(texts[0]) == 5 + 8 and texts[1] == texts[0][: texts[0].index(texts[0][7], 5) + 1]
    ending(-1)
    with caplog.at_level(logging.WARNING):
        reallm.generate(llama.folder, "x" * (POSITIONS - 5), max_new_tokens=5)
        assert "positions" not in caplog.text
        reallm.generate(llama.folder, "x" * (POSITIONS - 5), max_new_tokens=9)
    assert f"the text ends here because {llama.folder} has only {POSITIONS} positions" in caplog.text
    assert [len(text) for text in texts[2:]] == [POSITIONS, POSITIONS]


def test_prompts_are_refused_as_they_are_the_first_time(llama: Made) -> None:
    reallm.generate(llama.folder, "a", max_new_tokens=1)
    for prompt, reason in (("", "no tokens"), ("a\udcff", "surrogate"), ("x" * POSITIONS, f"{POSITIONS} tokens")):
        with pytest.raises(UserError, match=reason):
            reallm.generate(llama.folder, prompt, max_new_tokens=1)


def test_a_changed_artifact_is_refused(tmp_path: Path) -> None:
    made = make("llama", tmp_path)
    reallm.generate(made.folder, "a", max_new_tokens=1)
    weights = made.folder / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(UserError, match="was changed"):
        reallm.generate(made.folder, "a", max_new_tokens=1)
    raw[-1] ^= 1
    weights.write_bytes(raw)
    config = json.loads((made.folder / CONFIG_FILE).read_text())
    (made.folder / CONFIG_FILE).write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with pytest.raises(UserError, match=r"bytes, expected|was changed"):
        reallm.generate(made.folder, "a", max_new_tokens=1)


@pytest.mark.parametrize("change", ["rotary", "tokenizer", "settings", "logits"])
def test_nothing_is_kept_of_what_differs(llama: Made, change: str, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if change == "rotary":
        forward = Rotary.forward
        monkeypatch.setattr(
            Rotary, "forward", lambda self, dtype, index, kind="": forward(self, dtype, index + 1, kind)
        )
    elif change == "tokenizer":
        monkeypatch.setattr(prepared, "read_tokenizer", lambda folder: _lowercase(folder))
    elif change == "settings":
        monkeypatch.setattr(prepared, "_GREEDY_SETTINGS", prepared._GREEDY_SETTINGS - {"eos_token_id", "pad_token_id"})
    else:
        monkeypatch.setattr(prepared, "read_skeleton", _other_norms)
    reallm.generate(llama.folder, "a", max_new_tokens=1)
    assert not list(kept.glob("*"))


def _lowercase(folder: Path) -> Any:
    from tokenizers import Tokenizer, normalizers

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def _other_norms(*arguments: Any) -> Any:
    from reallm.runtime.step.skeleton import read_skeleton

    model = read_skeleton(*arguments)
    norm: Any = model.get_submodule("model.norm")
    weight: Tensor = norm.weight
    norm.weight = torch.nn.Parameter(weight + 1, requires_grad=False)
    return model


def test_artifacts_that_cannot_be_prepared(
    llama: Made, tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert not prepare_first_text(make("gpt2", tmp_path / "gpt2", lambda matrix: "int4-g16").folder)
    with monkeypatch.context() as patch:
        patch.setattr(generate_loaded, "MAX_PREPARED_BYTES", 1000)
        assert not prepare_first_text(llama.folder)
    with monkeypatch.context() as patch:
        patch.setenv("REALLM_NATIVE", "off")
        assert not prepare_first_text(llama.folder)
    damaged = tmp_path / "damaged"
    shutil.copytree(llama.folder, damaged)
    (damaged / "model.safetensors").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert not prepare_first_text(damaged)
    assert f"{damaged} is written, but cannot be loaded here" in caplog.text and not list(kept.glob("*"))
    assert prepare_first_text(llama.folder) and len(list(kept.glob("*.json"))) == 1


def test_old_facts_are_removed(tmp_path: Path) -> None:
    for index in range(prepared.MAX_KEPT + 3):
        (tmp_path / f"{index:03}.json").write_text("")
    prepared._remove_oldest(tmp_path)
    assert len(list(tmp_path.iterdir())) == prepared.MAX_KEPT
