"""The measured KV cache equals the formulas of known architectures."""

from __future__ import annotations

import pytest
from tiny import BLOCKS, HEAD_DIM, HEADS, tiny_model

from reallm.models.kv_cache import experts_per_token, kv_cache


@pytest.mark.parametrize(
    ("architecture", "heads", "windows"),
    [
        ("llama", 1, [None] * BLOCKS),
        ("qwen3_moe", 1, [None] * BLOCKS),
        ("gpt2", HEADS, [None] * BLOCKS),
        ("gemma2", 1, [32, None]),  # every other layer has a sliding window
    ],
)
def test_the_values_of_every_layer_are_counted(architecture: str, heads: int, windows: list[int | None]) -> None:
    model = tiny_model(architecture)
    layers = kv_cache(model)
    assert [layer.values for layer in layers] == [2 * heads * HEAD_DIM] * BLOCKS
    assert [layer.window for layer in layers] == windows
    assert not model.training


def test_an_encoder_has_no_cache() -> None:
    assert kv_cache(tiny_model("roberta")) == ()


def test_experts_per_token_come_from_the_configuration() -> None:
    assert experts_per_token(tiny_model("mixtral")) == 2
    assert experts_per_token(tiny_model("llama")) is None
