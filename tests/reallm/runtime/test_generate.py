"""`generate`: where a text has to end, and which prompts are refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import POSITIONS, VOCAB, save_tiny, tiny_model, tiny_tokenizer
from transformers import GenerationMixin, MptConfig, MptForCausalLM, PreTrainedModel

from reallm.errors import UserError
from reallm.runtime.generate import generate


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with 256 positions that never ends a text by itself; one letter is one token."""
    return saved(tiny_model("llama"), tmp_path_factory.mktemp("llama"))


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.generation_config.eos_token_id = -1
    model.config.eos_token_id = -1
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def added(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call of `generate` adds."""
    counts: list[int] = []
    call = GenerationMixin.generate  # the step goes through it, too

    def counting(self: PreTrainedModel, *arguments: Any, **options: Any) -> Any:
        output = call(self, *arguments, **options)
        counts.append(output.shape[1] - options["input_ids"].shape[1])
        return output

    monkeypatch.setattr(GenerationMixin, "generate", counting)
    return counts


@pytest.mark.parametrize("architecture", ["llama", "phi3"])  # through the step, and through transformers' loop
def test_a_text_ends_where_the_positions_end_and_a_warning_says_so(
    tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(tiny_model(architecture), tmp_path)
    counts = added(monkeypatch)
    prompt = "x" * (POSITIONS - 5)
    with caplog.at_level(logging.WARNING):
        generate(folder, prompt, max_new_tokens=5)
        assert not [record for record in caplog.records if "positions" in record.message]
        generate(folder, prompt, max_new_tokens=6)
        assert f"the text ends here because {folder} has only {POSITIONS} positions" in caplog.text
    assert counts == [5, 5]
    for length in (POSITIONS, POSITIONS + 30):
        with pytest.raises(UserError, match=f"the prompt has {length} tokens, and .* has only {POSITIONS} positions"):
            generate(folder, "x" * length, max_new_tokens=1)


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_a_table_of_positions_is_never_left(tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tiny_model(architecture), tmp_path)
    counts = added(monkeypatch)
    generate(folder, "x" * (POSITIONS - 3), max_new_tokens=40)
    assert counts == [3]


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("mistral", {"sliding_window": 32}),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 2.0}}),
    ],
    ids=str,
)
def test_sliding_windows_and_scaled_positions_go_on(
    tmp_path: Path, architecture: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tiny_model(architecture, settings=settings), tmp_path)
    counts = added(monkeypatch)
    generate(folder, "x" * (POSITIONS - 3), max_new_tokens=9)
    assert counts == [9]


def test_prompts_that_the_model_cannot_read(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no tokens"):
        generate(llama, "")
    with pytest.raises(UserError, match="the prompt: character 2 is half of a UTF-16 surrogate pair"):
        generate(llama, "a\udcff")
    folder = saved(tiny_model("llama"), tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=f"the prompt: .* the token id {VOCAB} .*the model has only {VOCAB} tokens"):
        generate(folder, "a<new>")
    assert generate(folder, "a", max_new_tokens=2).startswith("a")


def test_chat_templates_that_refuse_or_are_damaged(tmp_path: Path) -> None:
    folder = saved(tiny_model("llama"), tmp_path)
    for template, reason in (("{{ raise_exception('never') }}", "never"), ("{% if", "not valid Jinja")):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        with pytest.raises(UserError, match=reason):
            generate(folder, "hi", chat=True)


def test_settings_out_of_range_and_encoders_are_refused(llama: Path, tmp_path: Path) -> None:
    for settings in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}):
        with pytest.raises(UserError, match="expected at least 1 token and a temperature of 0 or more"):
            generate(llama, "a", **settings)
    folder = save_tiny("roberta", tmp_path)
    with pytest.raises(UserError, match="is RobertaForMaskedLM, which does not generate"):
        generate(folder, "a")


@pytest.mark.parametrize("architecture", ["llama", "phi3"])  # through the step, and through transformers' loop
def test_logits_that_are_not_finite_are_refused(tmp_path: Path, architecture: str) -> None:
    model = tiny_model(architecture)
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)
    folder = saved(model, tmp_path)
    for temperature in (0.0, 1.0):
        with pytest.raises(UserError, match="the logits of token 4 hold NaN or infinity"):
            generate(folder, "abc", temperature=temperature)


def test_linear_biases_end_with_their_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = MptConfig(vocab_size=VOCAB, d_model=48, n_heads=3, n_layers=1, max_seq_len=64)
    folder = saved(MptForCausalLM(config), tmp_path)
    counts = added(monkeypatch)
    generate(folder, "abc", max_new_tokens=100)
    assert counts == [61]


def test_a_vocabulary_padded_beyond_the_tokenizer(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.resize_token_embeddings(VOCAB + 40)
    model.lm_head.weight.data[VOCAB:] *= 100  # a token that the tokenizer does not have is the most likely one
    assert generate(saved(model, tmp_path), "abc", max_new_tokens=5).startswith("abc")
