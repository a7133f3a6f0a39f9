"""A compressed sentence encoder: what its artifact holds, and a classification head and adapters trained over it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from artifacts import Made
from encoders import save_sentence_encoder
from packing import Codes, PackedModel
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel

import reallm
from reallm.compilation.compile import compile_plan
from reallm.models.loaded import load_model
from reallm.runtime.packed import Packed

FORMATS = ("uint5-g24+ldl", "nf3-g8-dq8x8", "int4-g16", "uint4-g16+perm+cs")
IDS = torch.randint(5, 200, (24, 12), generator=torch.Generator().manual_seed(2))
LABELS = IDS[:, 0] % 3


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("encoder")
    source = save_sentence_encoder(folder / "model", dense=5)
    loaded = load_model(source)
    formats = {m.name: FORMATS[i % len(FORMATS)] for i, m in enumerate(loaded.matrices) if m.kind == "linear"}
    packed = PackedModel(loaded, lambda matrix: formats.get(matrix.name))
    plan = packed.write_plan(folder / "plan.json")
    output = compile_plan(plan, folder / "out", model=loaded, codes=Codes(packed), kernels=False)
    return Made(output, source, plan, loaded, packed)


def classifier(made: Made) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(made.folder, num_labels=3)


def train(model: nn.Module, steps: int = 80) -> tuple[float, float]:
    """Train everything that requires gradients on IDS; returns the first and the last loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=LABELS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[0], losses[-1]


def test_an_artifact_holds_the_steps_after_the_encoder(made: Made) -> None:
    for name in ("modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors", "sentence_bert_config.json"):
        assert (made.folder / name).read_bytes() == (made.source / name).read_bytes()
    assert reallm.verify(made.folder).matrices == len(made.packed.fields)
    model, tokenizer = reallm.load(made.folder)
    assert type(model).__name__ == "BertModel" and tokenizer is not None
    with torch.no_grad():
        found = AutoModel.from_pretrained(made.folder)(input_ids=IDS).last_hidden_state
        assert torch.equal(model(input_ids=IDS).last_hidden_state, found)
        expected = made.replaced()(input_ids=IDS).last_hidden_state
    assert torch.allclose(found, expected, atol=1e-4)


def test_a_change_of_the_pooling_is_noticed(made: Made, tmp_path: Path) -> None:
    again = made.again(tmp_path / "out")
    (again / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    with pytest.raises(reallm.ReallmError, match=r"1_Pooling/config\.json"):
        reallm.verify(again)


def test_a_classifier_starts_from_the_packed_encoder_and_trains_its_head(made: Made) -> None:
    model = classifier(made)
    with torch.no_grad():
        assert torch.equal(
            model.bert(input_ids=IDS).last_hidden_state, reallm.load(made.folder)[0](input_ids=IDS).last_hidden_state
        )
    assert model.classifier.weight.any()
    before = _fields(model)
    model.train()
    first, last = train(model)
    assert last < 0.7 * first, "norms, biases and the head are trainable"
    assert all(torch.equal(value, before[name]) for name, value in _fields(model).items()), "codes do not change"


def test_finetune_needs_predictions_of_tokens(made: Made, tmp_path: Path) -> None:
    with pytest.raises(reallm.ReallmError, match="BertModel, which predicts no tokens; expected a language model"):
        reallm.finetune(made.folder, output=tmp_path / "tuned", text=str(made.folder / "README.md"))


def test_gradients_flow_through_packed_layers(made: Made) -> None:
    """They equal those of the dense model with the decoded weights."""
    packed, dense = reallm.load(made.folder)[0], made.replaced()
    found = []
    for model in (packed, dense):
        embedded = model.embeddings(input_ids=IDS).detach().requires_grad_()
        hidden = model.encoder(embedded).last_hidden_state
        hidden.square().sum().backward()
        found.append(embedded.grad)
    assert torch.allclose(*found, rtol=1e-3, atol=1e-4 * float(found[1].abs().max()))


def test_plain_peft_trains_saves_and_loads(made: Made, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value", "dense"])
    model = peft.get_peft_model(classifier(made), settings)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("lora_A" in name for name in trained) and any("classifier" in name for name in trained)
    assert all("lora_" in name or "classifier" in name for name in trained)
    first, last = train(model)
    assert last < first
    model.eval().save_pretrained(tmp_path)
    torch.manual_seed(9)  # another head, which the saved one must replace
    again = AutoModelForSequenceClassification.from_pretrained(made.folder, num_labels=3)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        actual = peft.PeftModel.from_pretrained(again, tmp_path).eval()(input_ids=IDS).logits
    assert torch.allclose(actual, expected, atol=1e-5)


def _fields(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every packed field of `model`."""
    packed = {name: module for name, module in model.named_modules() if isinstance(module, Packed)}
    return {f"{name}.{key}": raw.clone() for name, module in packed.items() for key, raw in module.fields.items()}
