"""What a packed model refuses, because the result would be wrong without a word: saving or training a part of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import make, mixed
from torch import nn
from transformers import AutoModelForCausalLM

from reallm.errors import UserError
from reallm.runtime.field_bytes import add_low_rank
from reallm.runtime.frozen_weight import FrozenWeightError
from reallm.runtime.peft_wrappers import check_trainable


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama-tied", tmp_path_factory.mktemp("tied")).folder


@pytest.fixture(scope="module")
def packed_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("head"), mixed(("linear", "head"))).folder


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def test_an_attached_adapter_cannot_be_saved_as_an_artifact(tied: Path, tmp_path: Path) -> None:
    model = load(tied)
    add_low_rank(model.model.layers[1].mlp.up_proj, torch.ones(80, 2), torch.ones(2, 48))
    with pytest.raises(UserError, match=r"lose the adapter of model\.layers\.1\.mlp\.up_proj.*dequantize"):
        model.save_pretrained(tmp_path)


def test_a_gain_cannot_be_saved_as_an_artifact(tied: Path, tmp_path: Path) -> None:
    model = load(tied)
    model.model.layers[0].self_attn.q_proj.set_gain(torch.ones(48))
    with pytest.raises(UserError, match=r"lose the adapter of model\.layers\.0\.self_attn\.q_proj"):
        model.save_pretrained(tmp_path)
    model.model.layers[0].self_attn.q_proj.set_gain(None)
    model.save_pretrained(tmp_path)


@pytest.mark.parametrize("rows", [200, 270])
def test_packed_embeddings_cannot_be_resized(tied: Path, rows: int) -> None:
    with pytest.raises(FrozenWeightError, match=r"dequantize\(\)"):
        load(tied).resize_token_embeddings(rows)


def test_a_resized_head_cannot_be_saved_as_an_artifact(packed_head: Path, tmp_path: Path) -> None:
    model = load(packed_head)
    model.resize_token_embeddings(270)
    with pytest.raises(UserError, match="lm_head is no longer packed but a Linear"):
        model.save_pretrained(tmp_path)


def test_after_dequantize_embeddings_can_be_resized_and_saved(tied: Path, tmp_path: Path) -> None:
    model = load(tied).dequantize()
    model.resize_token_embeddings(270)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight and again.lm_head.weight.shape == (270, 48)


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens", "model.layers.0.mlp", "model.layers.0.mlp.up_proj"])
def test_a_module_with_packed_matrices_cannot_be_trained_whole(tied: Path, name: str) -> None:
    module = load(tied).get_submodule(name)
    with pytest.raises(UserError, match=r"modules_to_save cannot train .*its weight is packed"):
        check_trainable(module)


def test_other_modules_can_be_trained_whole(tied: Path) -> None:
    check_trainable(load(tied).model.norm)
    check_trainable(nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "mlp"])
def test_peft_asks(tied: Path, name: str) -> None:
    peft = pytest.importorskip("peft")
    with pytest.raises(UserError, match="modules_to_save cannot train"):
        peft.get_peft_model(load(tied), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=[name]))


def test_peft_trains_norms_whole_and_single_tokens(tied: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"], trainable_token_indices=[5])
    model = peft.get_peft_model(load(tied), config)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("model.norm.modules_to_save" in name for name in trained)
    assert any("trainable_tokens_delta" in name for name in trained)
