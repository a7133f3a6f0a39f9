"""Sentence encoders: pooling as sentence-transformers does it, which folders are loaded as one, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from encoders import save_sentence_encoder, tiny_encoder, wrapping_tokenizer
from safetensors.torch import load_file, save_file
from tiny import HIDDEN, save_tiny, tiny_tokenizer
from torch import Tensor
from transformers import AutoModel

from reallm.errors import UserError
from reallm.models.loaded import load_model
from reallm.models.sentence_encoder import SentenceEncoder, read_sentence_encoder

HIDDEN_STATES = torch.tensor([[[3.0, 0.0], [1.0, 4.0], [2.0, 8.0]], [[1.0, 1.0], [5.0, 2.0], [7.0, 7.0]]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])
POOLED = {  # computed by hand from the definitions
    "cls": [[3.0, 0.0], [1.0, 1.0]],
    "lasttoken": [[2.0, 8.0], [5.0, 2.0]],
    "max": [[3.0, 8.0], [5.0, 2.0]],
    "mean": [[2.0, 4.0], [3.0, 1.5]],
    "mean_sqrt_len_tokens": [[2.0, 4.0], [3.0, 1.5]],  # another length, the same direction
    "weightedmean": [[11 / 6, 32 / 6], [11 / 3, 5 / 3]],
}


@pytest.mark.parametrize("mode", POOLED)
def test_pooling_ignores_padding(mode: str) -> None:
    expected = torch.nn.functional.normalize(torch.tensor(POOLED[mode]), dim=1)
    assert torch.allclose(SentenceEncoder((mode,)).embed(HIDDEN_STATES, MASK), expected, atol=1e-6)


def test_the_steps_of_a_folder(tmp_path: Path) -> None:
    both = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}
    folder = save_sentence_encoder(tmp_path / "old", both)
    assert read_sentence_encoder(folder).modes == ("cls", "mean")
    assert read_sentence_encoder(save_sentence_encoder(tmp_path / "new", {"pooling_mode": "lasttoken"})).modes == (
        "lasttoken",
    )
    assert read_sentence_encoder(tmp_path).modes == ("mean",), "as sentence-transformers takes a plain folder"


def test_a_dense_layer_is_applied(tmp_path: Path) -> None:
    folder = save_sentence_encoder(tmp_path / "model", dense=5)
    stored = load_file(folder / "2_Dense" / "model.safetensors")
    hidden = torch.randn(2, 4, HIDDEN, generator=torch.Generator().manual_seed(0))
    expected = torch.tanh(hidden.mean(1) @ stored["linear.weight"].T + stored["linear.bias"])
    actual = read_sentence_encoder(folder).embed(hidden)
    assert actual.shape == (2, 5)
    assert torch.allclose(actual, torch.nn.functional.normalize(expected, dim=1), atol=1e-6)


def test_a_masked_model_in_a_sentence_transformers_folder_is_an_encoder(tmp_path: Path) -> None:
    save_tiny("roberta", tmp_path)
    assert load_model(tmp_path).sentence_encoder is None
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    steps = [{"path": "", "type": "a.Transformer"}, {"path": "1_Pooling", "type": "b.Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(steps))
    loaded = load_model(tmp_path)
    assert type(loaded.model).__name__ == "RobertaModel"
    assert loaded.sentence_encoder is not None and loaded.sentence_encoder.modes == ("cls",)


def test_an_encoder_without_a_pooler_in_its_file(tmp_path: Path) -> None:
    tiny_encoder().save_pretrained(tmp_path)
    wrapping_tokenizer().save_pretrained(tmp_path)
    tensors = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if "pooler" not in k}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = load_model(tmp_path)
    assert not any(p.any() for n, p in loaded.model.named_parameters() if n.startswith("pooler."))
    assert any("no pooler" in note for note in loaded.notes)
    del tensors["encoder.layer.0.output.dense.bias"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="values would be random"):
        load_model(tmp_path)


def test_a_decoder_without_its_head_is_refused(tmp_path: Path) -> None:
    AutoModel.from_pretrained(save_tiny("llama", tmp_path / "whole")).save_pretrained(tmp_path / "body")
    tiny_tokenizer().save_pretrained(tmp_path / "body")
    with pytest.raises(UserError, match="LlamaModel: it has no output layer for tokens"):
        load_model(tmp_path / "body")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("modules.json", "{}", "expected a list of modules"),
        ("modules.json", "[", "cannot be read as JSON"),
        ("modules.json", '[{"path": "0_CNN", "type": "x.CNN"}]', "lists CNN; expected a Transformer"),
        ("1_Pooling/config.json", '{"pooling_mode": "median"}', "pooling mode 'median'; expected one of cls"),
        ("2_Dense/config.json", '{"activation_function": "my.code.Act"}', "a Dense layer with Act"),
        ("2_Dense/model.safetensors", "damaged", "cannot be read"),
    ],
)
def test_damaged_files_are_named(file: str, text: str, message: str, tmp_path: Path) -> None:
    folder = save_sentence_encoder(tmp_path / "model", dense=5)
    (folder / file).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_step_outside_the_folder_is_refused(tmp_path: Path) -> None:
    folder = save_sentence_encoder(tmp_path / "model")
    steps = json.loads((folder / "modules.json").read_text())
    steps[1]["path"] = "../elsewhere"
    (folder / "modules.json").write_text(json.dumps(steps))
    with pytest.raises(UserError, match="leaves the folder"):
        load_model(folder)


def test_pooling_runs_in_float32() -> None:
    hidden = torch.ones(1, 3, 2, dtype=torch.bfloat16)
    result: Tensor = SentenceEncoder().embed(hidden)
    assert result.dtype == torch.float32 and torch.allclose(result, torch.full((1, 2), 0.5**0.5))
