"""Vision-language artifacts loaded whole and as their text part, and artifacts loaded without their head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures.build import save_model, tiny_model
from architectures.cases import select
from architectures.picture import with_picture
from artifacts import Made, make, mixed
from packing import Codes, PackedModel
from tiny import tiny_tokenizer
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from reallm.compilation.compile import compile_plan
from reallm.errors import UserError
from reallm.models.loaded import load_model
from reallm.runtime import parts
from reallm.runtime.install import packed_modules
from reallm.runtime.load import load

TOKENS = torch.arange(10, 40)[None]


def compiled(name: str, folder: Path) -> Made:
    """The tiny model of one case of the sweep, with random codes in all its matrices, also those of a vision tower."""
    (case,) = [case for case in select([name]) if case.name == name]
    save_model(tiny_model(case), tiny_tokenizer(), folder / "model")
    loaded = load_model(folder / "model")
    packed = PackedModel(loaded, mixed())
    plan = packed.write_plan(folder / "plan.json")
    output = compile_plan(plan, folder / "out", model=loaded, codes=Codes(packed), kernels=False)
    return Made(output, folder / "model", plan, loaded, packed)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Its text class has other names for its tensors than the whole model."""
    return compiled("qwen3_5", tmp_path_factory.mktemp("qwen"))


def logits(model: PreTrainedModel, ids: torch.Tensor = TOKENS, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **inputs).logits


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl", "qwen3_vl", "llava", "idefics3", "smolvlm"])
def test_a_picture_is_seen_as_by_the_decoded_weights(name: str, tmp_path: Path) -> None:
    made = compiled(name, tmp_path)
    expected_model = made.replaced()
    ids, picture = with_picture(expected_model, TOKENS)
    expected = logits(expected_model, ids, **picture)
    model = AutoModelForImageTextToText.from_pretrained(made.folder)
    found = logits(model, ids, **picture)
    # Products in float32 with sums in another order, as in test_compile.py, in twice as many layers.
    torch.testing.assert_close(found, expected, rtol=0, atol=30 * 261 * 2.0**-24 * expected.abs().max().item())
    assert not torch.equal(logits(model), found[:, : TOKENS.shape[1]])
    other, _ = load(made.folder)
    assert type(other) is type(model) and torch.equal(logits(other, ids, **picture), found)
    text = model.generate(input_ids=ids, **picture, max_new_tokens=3, do_sample=False)
    assert text.shape[1] > ids.shape[1]
    dense = model.dequantize()
    torch.testing.assert_close(
        logits(dense, ids, **picture), found, rtol=0, atol=30 * 261 * 2.0**-24 * found.abs().max().item()
    )


def test_the_text_part_computes_what_the_whole_model_does(qwen: Made, tmp_path: Path) -> None:
    whole, text = (auto.from_pretrained(qwen.folder) for auto in (AutoModelForImageTextToText, AutoModelForCausalLM))
    assert type(whole) is not type(text) and len(list(packed_modules(text))) < len(list(packed_modules(whole)))
    assert torch.equal(logits(text), logits(whole))
    text.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(whole))


def test_the_base_model_has_the_same_hidden_states(qwen: Made) -> None:
    whole, base = AutoModelForImageTextToText.from_pretrained(qwen.folder), AutoModel.from_pretrained(qwen.folder)
    with torch.no_grad():
        expected = whole(TOKENS, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(base(TOKENS).last_hidden_state, expected)


def test_a_class_whose_blocks_are_not_in_the_artifact_is_refused(qwen: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "changes_of", lambda model: [])  # as if transformers knew no names of the text part
    with pytest.raises(UserError, match=r"loaded as Qwen3_5ForCausalLM, whose tensor 'model\.layers\.0\..* not have"):
        AutoModelForCausalLM.from_pretrained(qwen.folder)


def test_another_head_starts_anew_and_is_saved(tmp_path: Path) -> None:
    made = make("llama", tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(made.folder, num_labels=2)
    assert not any(name.startswith("lm_head") for name, _ in packed_modules(model))
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
