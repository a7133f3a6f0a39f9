"""A packed model's `dtype` and `device`, with and without parameters, and on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from packing import Codes, PackedModel
from tiny import save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM, OlmoConfig

import reallm
from reallm.compilation.compile import compile_plan
from reallm.errors import UserError
from reallm.models.loaded import load_model

TOKENS = torch.arange(3, 20)[None]


@pytest.fixture(scope="module")
def olmo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact whose model has no parameter: OLMo's norms have no weights."""
    folder = tmp_path_factory.mktemp("olmo")
    config = OlmoConfig(
        vocab_size=261, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=3,
        max_position_embeddings=128, bos_token_id=0, pad_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    loaded = load_model(folder / "model")
    packed = PackedModel(loaded, lambda matrix: "int4-g16")
    plan = packed.write_plan(folder / "plan.json")
    return compile_plan(plan, folder / "out", model=loaded, codes=Codes(packed), kernels=False)


def test_a_model_without_parameters_has_a_dtype_and_a_device(olmo: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(olmo)
    assert not list(model.parameters())
    assert (model.dtype, model.model.dtype, model.device.type) == (torch.bfloat16, torch.bfloat16, "cpu")
    assert model.to(torch.float32).dtype == torch.float32
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_it_generates_and_is_evaluated(olmo: Path, tmp_path: Path) -> None:
    assert reallm.generate(olmo, "a bad", max_new_tokens=3).startswith("a bad")
    (tmp_path / "text.txt").write_text("a bad cab, a fab bag. " * 40)
    assert reallm.evaluate(olmo, text=str(tmp_path / "text.txt"), seqlen=32, windows=2).comparison.windows == 2


def test_the_dtype_is_not_that_of_a_first_tensor_in_float32(tmp_path: Path) -> None:
    loaded = load_model(save_tiny("llama", tmp_path / "model", dtype=torch.bfloat16))
    packed = PackedModel(loaded, lambda matrix: "int4-g16")
    plan = packed.write_plan(tmp_path / "plan.json")
    folder = compile_plan(plan, tmp_path / "out", model=loaded, codes=Codes(packed), kernels=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    first = next(model.parameters())
    first.data = first.data.float()
    assert model.dtype == torch.bfloat16


def test_plain_models_answer_as_before(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_tiny("llama", tmp_path))
    assert model.dtype == torch.float32 and model.half().dtype == torch.float16 and model.device.type == "cpu"


def test_offloaded_to_the_disk_it_computes_the_same(olmo: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(olmo)(TOKENS).logits
        model = AutoModelForCausalLM.from_pretrained(olmo, device_map={"": "disk"}, offload_folder=tmp_path)
        assert (model.device.type, model.dtype) == ("cpu", torch.bfloat16)
        assert torch.equal(model(TOKENS).logits, expected)
    assert model.generate(TOKENS, max_new_tokens=3, eos_token_id=-1).shape == (1, 20)


def test_packed_bytes_on_the_disk_are_refused(olmo: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="load it without `offload_buffers`"):
        AutoModelForCausalLM.from_pretrained(
            olmo, device_map={"": "disk"}, offload_folder=tmp_path, offload_buffers=True
        )
