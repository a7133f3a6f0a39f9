"""The compiled decode step: the logits of transformers' own path, in float32, whatever the architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from artifacts import make
from compilers import needs_compiler
from tiny import VOCAB, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

import reallm
from reallm.runtime.step.cpu import CacheOverflowError, Step, compile_step
from reallm.runtime.step.model_reader import read_step
from reallm.runtime.step.rotary import StepUnsupportedError

KNOWN = ("llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")
PROMPT, DECODED = 43, 20
TOKENS = torch.randint(0, VOCAB, (PROMPT + DECODED,), generator=torch.Generator().manual_seed(0))
TOLERANCE = 2e-5
"""Both sides sum up to 80 products of size 1 or less in float32, in another order, in 2 layers of 7 products each and a
head: 14 * 80 * 2^-24 of values of size 1 is 7e-5 if all errors agreed and 2e-6 as a random walk; logits are below 4."""


def dense_logits(model: PreTrainedModel, tokens: Tensor = TOKENS) -> Tensor:
    """Logits [tokens, vocabulary] of transformers' forward."""
    with torch.no_grad():
        return model(tokens[None]).logits[0].float()


def step_logits(step: Step, prompt: int = PROMPT) -> Tensor:
    """Logits after the prompt and after every token that follows."""
    step.reserve(len(TOKENS))
    rows = [step.run(TOKENS[:prompt])]
    rows += [step.run(TOKENS[index : index + 1]) for index in range(prompt, len(TOKENS))]
    return torch.stack(rows)


def agree(model: PreTrainedModel, tolerance: float = TOLERANCE) -> Step:
    """The model's step, after its logits were compared with the model's."""
    step = compile_step(model)
    expected = dense_logits(model)[PROMPT - 1 :]
    torch.testing.assert_close(step_logits(step), expected, rtol=0, atol=tolerance)
    return step


@needs_compiler
@pytest.mark.parametrize("architecture", KNOWN)
def test_prompt_and_decode_give_the_logits_of_transformers(architecture: str) -> None:
    agree(tiny_model(architecture))


@needs_compiler
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_half_precision_weights_are_read_as_they_are(architecture: str) -> None:
    model = tiny_model(architecture, dtype=torch.bfloat16)
    step = compile_step(model)
    expected = dense_logits(model.float())[PROMPT - 1 :]  # the scale of Gemma's embedding is rounded before, here after
    torch.testing.assert_close(step_logits(step), expected, rtol=0, atol=TOLERANCE if architecture == "llama" else 2e-2)


@needs_compiler
@pytest.mark.parametrize("window", [7, PROMPT])
def test_sliding_windows(window: int) -> None:
    agree(tiny_model("mistral", settings={"sliding_window": window}))


@needs_compiler
@pytest.mark.parametrize(
    "settings",
    [
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 10000.0,
            }
        },
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 20, "num_key_value_heads": 3},
        {"hidden_size": 51, "intermediate_size": 83},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_settings_of_llama(settings: dict[str, object]) -> None:
    agree(tiny_model("llama", settings=settings))


@needs_compiler
def test_scores_and_logits_are_capped_where_they_are_large() -> None:
    settings = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.0, "query_pre_attn_scalar": 1}
    agree(tiny_model("gemma2", settings=settings))


@needs_compiler
def test_layers_of_two_kinds() -> None:
    kinds = ["sliding_attention", "full_attention"]
    agree(tiny_model("gemma3", settings={"layer_types": kinds, "sliding_window": 8}))


@needs_compiler
def test_a_prompt_longer_than_one_turn_and_than_one_span_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reallm.runtime.step.cpu.PROMPT_TOKENS", 100)
    model = tiny_model("llama", settings={"max_position_embeddings": 1024})
    tokens = torch.randint(0, VOCAB, (615,), generator=torch.Generator().manual_seed(1))
    step = compile_step(model)
    step.reserve(len(tokens))
    expected = dense_logits(model, tokens)
    torch.testing.assert_close(step.run(tokens[:610]), expected[609], rtol=0, atol=TOLERANCE)
    for index in range(610, 615):
        torch.testing.assert_close(step.run(tokens[index : index + 1]), expected[index], rtol=0, atol=TOLERANCE)


@needs_compiler
def test_a_cache_in_bfloat16_is_close() -> None:
    model = tiny_model("llama")
    found = step_logits(compile_step(model, "bf16"))
    # keys and values are rounded to 8 bits, 2^-9 of themselves each: so are scores and sums of values, on a residual
    # stream that carries as much again from the embedding; logits below 4
    torch.testing.assert_close(found, dense_logits(model)[PROMPT - 1 :], rtol=0, atol=4 * 2**-6)


FOLDED = {
    "model.layers.0.self_attn.o_proj": "aq1x4-d4+perm",
    "model.layers.0.mlp.down_proj": "aq1x4-d4+perm+cs",
    "model.layers.1.mlp.down_proj": "e8p2+perm+rot",
}
NOT_FOLDED = {
    "model.layers.0.self_attn.q_proj": "aq1x4-d4+perm",  # a norm makes its input, and others read that
    "model.layers.1.self_attn.o_proj": "aq1x4-d4+perm+o5",  # outliers read the input as it is
}


@needs_compiler
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_what_makes_the_input_of_a_permuted_matrix_writes_it_in_order(architecture: str, tmp_path: Path) -> None:
    made = make(architecture, tmp_path, lambda matrix: (FOLDED | NOT_FOLDED).get(matrix.name))
    model, _ = reallm.load(made.folder, dtype=torch.float32)
    step, expected = compile_step(model), dense_logits(made.replaced())
    assert {weight.name for weight in step.program.weights if weight.ordered} == set(FOLDED)
    tolerance = TOLERANCE * max(1.0, float(expected.abs().max()))  # random codes: larger than a trained matrix
    torch.testing.assert_close(step_logits(step), expected[PROMPT - 1 :], rtol=0, atol=tolerance)


@needs_compiler
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    step, threads = compile_step(tiny_model("gemma2")), torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            runs.append(step_logits(step))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(run, runs[0]) for run in runs)


@needs_compiler
def test_a_second_text_knows_nothing_of_the_first() -> None:
    step = compile_step(tiny_model("llama"))
    first = step_logits(step)
    step.reserve(10)
    step.run(TOKENS[5:15])
    assert torch.equal(step_logits(step), first)


@needs_compiler
def test_a_full_cache_says_so_and_changes_nothing() -> None:
    step = compile_step(tiny_model("llama"))
    step.reserve(1)
    room = step.capacity
    step.run(TOKENS[:1].expand(room - 1))
    with pytest.raises(CacheOverflowError, match=f"{room - 1} \\+ 2 tokens are more than the {room} positions"):
        step.run(TOKENS[:2])
    step.run(TOKENS[:1])
    assert step.position == room


@needs_compiler
@pytest.mark.parametrize("tokens", [[], [VOCAB], [-1]])
def test_tokens_outside_the_vocabulary_are_refused(tokens: list[int]) -> None:
    step = compile_step(tiny_model("llama"))
    step.reserve(8)
    with pytest.raises(ValueError, match=f"all tokens below {VOCAB}"):
        step.run(torch.tensor(tokens, dtype=torch.int64))


def with_hook(model: PreTrainedModel) -> None:
    model.model.norm.register_forward_hook(lambda *_: None)


def with_other_activation(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.act_fn = torch.nn.ReLU()


def with_layer_norm(model: PreTrainedModel) -> None:
    model.model.layers[0].input_layernorm = torch.nn.LayerNorm(48)


def with_another_part(model: PreTrainedModel) -> None:
    model.model.layers[0].adapter = torch.nn.Linear(48, 48)


def with_another_method(model: PreTrainedModel) -> None:
    model.prepare_inputs_for_generation = lambda *_: {}


def in_training(model: PreTrainedModel) -> None:
    model.train()


def with_one_layer_less(model: PreTrainedModel) -> None:
    model.config.num_hidden_layers = 3


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (with_hook, "model.norm has a hook"),
        (with_other_activation, "neither silu nor gelu"),
        (with_layer_norm, "input_layernorm is a LayerNorm, not a supported norm"),
        (with_another_part, "additional or missing parts: adapter"),
        (in_training, "training mode"),
        (with_another_method, "prepare_inputs_for_generation of the model was replaced"),
        (with_one_layer_less, "layers"),
    ],
)
def test_whatever_it_cannot_account_for_is_refused(spoil: Callable[[PreTrainedModel], None], reason: str) -> None:
    model = tiny_model("llama")
    spoil(model)
    with pytest.raises(StepUnsupportedError, match=reason):
        read_step(model)


@pytest.mark.parametrize("architecture", ["phi3", "opt", "gpt2", "mixtral", "qwen3_moe", "roberta"])
def test_other_architectures_are_refused_by_name(architecture: str) -> None:
    with pytest.raises(StepUnsupportedError, match="not among the supported architectures"):
        read_step(tiny_model(architecture))


def test_a_rotation_that_changes_with_the_text_is_refused() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(StepUnsupportedError, match="dynamic"):
        read_step(tiny_model("llama", settings={"rope_parameters": rope}))


def test_without_native_code_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REALLM_NATIVE", "off")
    with pytest.raises(StepUnsupportedError, match="native code"):
        compile_step(tiny_model("llama", settings={"hidden_size": 51}))
