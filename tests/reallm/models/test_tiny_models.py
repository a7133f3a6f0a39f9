"""The tiny models of the tests: one seed gives one model, and a saved model loads again."""

import pytest
import torch
from tiny import ARCHITECTURES, POSITIONS, VOCAB, save_tiny, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saved_model_loads_equal_and_runs(architecture, tmp_path):
    save_tiny(architecture, tmp_path, seed=3)
    auto = AutoModelForMaskedLM if architecture == "roberta" else AutoModelForCausalLM
    loaded, made = auto.from_pretrained(tmp_path), tiny_model(architecture, seed=3)
    for (name, left), right in zip(loaded.named_parameters(), made.parameters(), strict=True):
        assert torch.equal(left, right), name
    logits = loaded(input_ids=torch.arange(5, 17)[None]).logits
    assert logits.shape == (1, 12, VOCAB)
    assert logits.isfinite().all()


def test_seed_changes_the_weights():
    first, second = (next(tiny_model("llama", seed).parameters()) for seed in (0, 1))
    assert not torch.equal(first, second)


def test_tokenizer_round_trips_bytes_and_has_a_chat_template(tmp_path):
    save_tiny("llama", tmp_path)
    for tokenizer in (tiny_tokenizer(), AutoTokenizer.from_pretrained(tmp_path)):
        ids = tokenizer("Hällo\n\twörld")["input_ids"]
        assert len(ids) == len("Hällo\n\twörld".encode())
        assert tokenizer.decode(ids) == "Hällo\n\twörld"
        assert len(tokenizer) == VOCAB
        assert tokenizer.model_max_length == POSITIONS
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
        assert chat == "<s>user: hi</s>"
