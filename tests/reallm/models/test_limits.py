"""The longest context of a model, and the number of its token ids."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import POSITIONS, VOCAB, tiny_model
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, FalconConfig, FalconForCausalLM, PreTrainedModel

from reallm.models.limits import max_positions, vocabulary_size


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "roberta"])
def test_positions_of_rotary_and_of_learned_embeddings(architecture: str) -> None:
    assert max_positions(tiny_model(architecture)) == POSITIONS


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, POSITIONS),
        ({"rope_type": "linear", "factor": 4.0}, 4 * POSITIONS),
        ({"rope_type": "dynamic", "factor": 2.0}, 2 * POSITIONS),
        ({"rope_type": "yarn", "factor": 4.0}, 4 * POSITIONS),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, POSITIONS),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "original_max_position_embeddings": 64,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
            POSITIONS,
        ),
    ],
    ids=str,
)
def test_the_scaling_of_rotary_embeddings_counts(rope: dict[str, Any], expected: int) -> None:
    model = tiny_model("llama", settings={"rope_parameters": {"rope_theta": 10_000.0} | rope})
    assert max_positions(model) == expected


def test_layers_that_see_a_window_only_have_no_limit() -> None:
    assert max_positions(tiny_model("mistral")) == POSITIONS
    assert max_positions(tiny_model("mistral", settings={"sliding_window": 32})) is None
    assert max_positions(tiny_model("qwen2", settings={"sliding_window": 32})) == POSITIONS  # use_sliding_window is off
    gemma = {"layer_types": ["sliding_attention", "sliding_attention"]}
    assert max_positions(tiny_model("gemma3", settings=gemma)) is None
    gemma = {"layer_types": ["sliding_attention", "full_attention"]}
    assert max_positions(tiny_model("gemma3", settings=gemma)) == POSITIONS


@pytest.mark.parametrize(
    "model",
    [
        BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2)),
        FalconForCausalLM(
            FalconConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, alibi=True)
        ),
    ],
    ids=lambda model: type(model).__name__,
)
def test_linear_biases_have_no_limit(model: PreTrainedModel) -> None:
    assert max_positions(model) is None


def test_a_word_embedding_with_as_many_rows_as_positions_is_not_a_table_of_positions() -> None:
    assert max_positions(tiny_model("llama", settings={"max_position_embeddings": VOCAB})) == VOCAB


def test_token_ids_are_below_the_rows_of_the_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    assert vocabulary_size(model) == VOCAB
    model.resize_token_embeddings(VOCAB + 3)
    assert vocabulary_size(model) == VOCAB + 3
    model.lm_head = nn.Linear(48, VOCAB)  # a token that cannot be predicted cannot be scored
    assert vocabulary_size(model) == VOCAB
    for name in ("get_input_embeddings", "get_output_embeddings"):
        monkeypatch.setattr(model, name, nn.Identity)
    assert vocabulary_size(model) is None
