"""`model.dequantize()`: an ordinary model with the decoded weights, which loads without reallm once it is saved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from artifacts import Made, make, mixed
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from reallm.errors import UserError
from reallm.runtime.install import packed_modules
from reallm.runtime.training.start import train_low_rank

TOKENS = torch.arange(3, 40)[None] % 261
CASES = ("llama-tied", "gpt2", "mixtral", "gemma3", "roberta", "opt", "phi3")


@pytest.fixture(scope="module", params=CASES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    yield make(request.param, tmp_path_factory.mktemp("made"), mixed())


def from_pretrained(folder: Path, **options: object) -> PreTrainedModel:
    masked = '"RobertaForMaskedLM"' in (folder / "config.json").read_text()
    return (AutoModelForMaskedLM if masked else AutoModelForCausalLM).from_pretrained(folder, **options)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def test_the_logits_stay_and_nothing_is_packed(made: Made) -> None:
    model = from_pretrained(made.folder)
    before = logits(model)
    assert model.dequantize() is model
    # Products in float32 with sums in another order, as in tests/reallm/compilation/test_compile.py.
    torch.testing.assert_close(logits(model), before, rtol=0, atol=15 * 261 * 2.0**-24 * before.abs().max().item())
    assert not list(packed_modules(model)) and not hasattr(model, "hf_quantizer")


def test_modules_and_tensors_are_those_of_the_original(made: Made) -> None:
    original, model = from_pretrained(made.source), from_pretrained(made.folder).dequantize()
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in original.named_modules()}
    first, second = (dict(m.named_parameters(remove_duplicate=False)) for m in (original, model))
    assert {n: (p.shape, p.dtype, p.requires_grad) for n, p in first.items()} == {
        n: (p.shape, p.dtype, p.requires_grad) for n, p in second.items()
    }
    assert model.all_tied_weights_keys == original.all_tied_weights_keys
    for target, source in original.all_tied_weights_keys.items():
        assert second[target] is second[source]
    assert model.config.tie_word_embeddings == original.config.tie_word_embeddings


def test_the_weights_are_those_of_the_reference_decode(made: Made) -> None:
    model, expected = from_pretrained(made.folder).dequantize(), made.replaced()
    for name, parameter in expected.named_parameters():
        # The reference is in float64; ours rounds sums of at most 80 terms in float32.
        bound = 80 * 2.0**-24 * parameter.abs().max().item()
        torch.testing.assert_close(model.get_parameter(name), parameter.data, rtol=0, atol=bound)


def test_a_saved_one_is_an_ordinary_model(made: Made, tmp_path: Path) -> None:
    model = from_pretrained(made.folder).dequantize()
    model.save_pretrained(tmp_path)
    assert "reallm" not in (tmp_path / "config.json").read_text()
    first, second = (load_file(folder / "model.safetensors") for folder in (made.source, tmp_path))
    assert {name: tensor.shape for name, tensor in first.items()} == {n: tensor.shape for n, tensor in second.items()}
    again = from_pretrained(tmp_path)
    assert not hasattr(again, "hf_quantizer") and torch.equal(logits(again), logits(model))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("llama"), dtype=torch.bfloat16).folder


def test_the_dtype_is_that_of_the_packed_model_or_the_one_asked_for(llama: Path) -> None:
    assert {p.dtype for p in from_pretrained(llama).dequantize().parameters()} == {torch.bfloat16}
    assert {p.dtype for p in from_pretrained(llama).to(torch.float32).dequantize().parameters()} == {torch.float32}
    assert {p.dtype for p in from_pretrained(llama).dequantize(torch.float16).parameters()} == {torch.float16}


def test_generate_no_longer_uses_the_decode_step(llama: Path) -> None:
    model = from_pretrained(llama, dtype=torch.float32)
    before = model.generate(TOKENS[:, :5], max_new_tokens=4, do_sample=False, eos_token_id=-1)
    model.dequantize()
    assert "generate" not in vars(model)
    assert torch.equal(model.generate(TOKENS[:, :5], max_new_tokens=4, do_sample=False, eos_token_id=-1), before)


def test_a_matrix_in_training_is_refused(llama: Path) -> None:
    model = from_pretrained(llama)
    train_low_rank(dict(packed_modules(model))["model.layers.1.mlp.up_proj"], rank=9)
    with pytest.raises(UserError, match="packed matrices are being trained"):
        model.dequantize()


def test_an_adapter_of_a_transposed_weight_is_refused(tmp_path: Path) -> None:
    """PEFT would add its product to the transposed weight without a word where the matrix is square."""
    model = from_pretrained(make("gpt2", tmp_path).folder)
    attention = model.transformer.h[0].attn
    wrapper = torch.nn.Module()
    wrapper.base_layer, attention.c_proj = attention.c_proj, wrapper
    with pytest.raises(UserError, match=r"h\.0\.attn\.c_proj\.base_layer .*unload it"):
        model.dequantize()
