"""Loaded models: their digest, copies of their weights, and their longest context."""

import pytest
import torch
from direct import loaded_tiny
from tiny import save_tiny, tiny_model

from reallm.models.loaded import load_model, model_digest


def test_weight_is_a_copy():
    loaded = loaded_tiny("llama")
    for matrix in loaded.matrices[:2]:
        loaded.weight(matrix).fill_(7.0)
        assert not (loaded.weight(matrix) == 7.0).any()


def test_digest_depends_on_the_weights_and_not_on_the_path(tmp_path):
    first = load_model(save_tiny("llama-tied", tmp_path / "a"))
    sharded = load_model(save_tiny("llama-tied", tmp_path / "elsewhere" / "b", max_shard_size="60KB"))
    assert len(list((tmp_path / "elsewhere" / "b").glob("*.safetensors"))) > 1
    assert first.digest == sharded.digest
    assert len(first.digest) == 64
    with torch.no_grad():
        sharded.model.model.layers[1].mlp.down_proj.weight[3, 4] += 1e-3
    assert model_digest(sharded.model) != first.digest


def test_digest_depends_on_dtype_and_configuration(tmp_path):
    model = tiny_model("llama")
    digest = model_digest(model)
    assert model_digest(tiny_model("llama")) == digest
    assert model_digest(tiny_model("llama", seed=1)) != digest
    assert model_digest(tiny_model("llama", dtype=torch.bfloat16)) != digest
    model.config.rms_norm_eps = 1e-3
    assert model_digest(model) != digest


def test_longest_context_and_kind_of_model():
    tiny = {name: loaded_tiny(name) for name in ("llama", "gpt2", "opt", "roberta")}
    assert (tiny["llama"].max_positions, tiny["llama"].is_encoder) == (256, False)
    assert (tiny["gpt2"].max_positions, tiny["opt"].max_positions) == (256, 256)
    assert (tiny["roberta"].max_positions, tiny["roberta"].is_encoder) == (256, True)
    roberta = tiny["roberta"].model
    assert roberta(input_ids=torch.full((1, 256), 9)).logits.isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        roberta(input_ids=torch.full((1, 257), 9))
