"""LoRA adapters: trained over an artifact, read back, attached, switched, refused; PEFT gives the same where it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from packing import Codes, PackedModel
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_tokenizer
from torch import Tensor

from reallm.artifacts.adapter_layout import CONFIG_FILE, WEIGHTS_FILE
from reallm.artifacts.peft_files import Adapter, read_adapter, write_adapter
from reallm.compilation.compile import compile_plan
from reallm.errors import UserError
from reallm.finetuning.objective import token_losses
from reallm.finetuning.run import finetune
from reallm.models.loaded import load_model
from reallm.runtime.attach_adapter import attach_adapter
from reallm.runtime.load import load

Factors = dict[str, tuple[Tensor, Tensor]]
pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(20)[None]


def artifact_of(folder: Path, formats: tuple[str, ...] = ("int4-g16", "int4-g16+r2i8"), seed: int = 0) -> Path:
    """A tiny llama in `formats` in turn; its codes are drawn at random."""
    loaded = load_model(save_tiny("llama", folder / "model", seed=seed))
    linears = [matrix.name for matrix in loaded.matrices if matrix.kind == "linear"]
    chosen = {name: formats[i % len(formats)] for i, name in enumerate(linears)}
    packed = PackedModel(loaded, lambda matrix: chosen.get(matrix.name))
    plan = packed.write_plan(folder / "plan.json")
    return compile_plan(plan, folder / "out", model=loaded, codes=Codes(packed), kernels=False)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return artifact_of(tmp_path_factory.mktemp("adapters"))


def draw(artifact: Path, seed: int, rank: int = 3) -> Factors:
    """Factors of every attention matrix, small beside its weights; the first of another rank."""
    model, _ = load(artifact, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    found: Factors = {}
    for name, module in model.named_modules():
        if name.endswith("_proj") and "attn" in name:
            own = rank + (not found)
            left = 0.1 * torch.randn(module.out_features, own, generator=generator)
            found[name] = (left, 0.1 * torch.randn(own, module.in_features, generator=generator))
    return found


@torch.no_grad()
def logits(artifact: Path, adapter: Path | None = None) -> Tensor:
    model, _ = load(artifact, dtype=torch.float32, adapter=adapter)
    result: Tensor = model(input_ids=IDS).logits
    return result


@torch.no_grad()
def expected(artifact: Path, factors: Factors) -> Tensor:
    """The same by hooks that add L R x to what the modules give."""
    model, _ = load(artifact, dtype=torch.float32)
    for name, (left, right) in factors.items():
        pair = (left, right)
        model.get_submodule(name).register_forward_hook(lambda m, x, y, pair=pair: y + x[0] @ pair[1].T @ pair[0].T)
    result: Tensor = model(input_ids=IDS).logits
    return result


def test_an_attached_adapter_adds_its_terms_and_adapters_can_be_switched(artifact: Path, tmp_path: Path) -> None:
    plain = logits(artifact)
    for seed in (1, 2):
        factors = draw(artifact, seed)
        folder = write_adapter(tmp_path / str(seed), factors, artifact)
        wanted = expected(artifact, factors)
        # factors rounded to fp16, 2^-11 of each; what they change is of the size of the logits themselves
        torch.testing.assert_close(
            logits(artifact, folder), wanted, rtol=0, atol=8 * 2.0**-11 * float(wanted.abs().max())
        )
        assert float((wanted - plain).abs().max()) > 0.05 * float(plain.abs().max())
    torch.testing.assert_close(logits(artifact), plain, rtol=0, atol=0)


def test_peft_scaling_is_read(artifact: Path, tmp_path: Path) -> None:
    factors = draw(artifact, 1)
    folder = write_adapter(tmp_path / "a", factors, artifact)
    config = json.loads((folder / CONFIG_FILE).read_text())
    name = next(iter(factors))
    (folder / CONFIG_FILE).write_text(json.dumps(config | {"alpha_pattern": {}, "lora_alpha": 8, "use_rslora": True}))
    left, right = read_adapter(folder).factors[name]
    torch.testing.assert_close(left, factors[name][0] * 8 / 4**0.5)  # the first has rank 4
    torch.testing.assert_close(right, factors[name][1])


def test_peft_gives_the_same(artifact: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder = write_adapter(tmp_path / "a", draw(artifact, 1), artifact)
    model, _ = load(artifact, dtype=torch.float32)
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(model, folder)(input_ids=IDS).logits
    wanted = logits(artifact, folder)
    torch.testing.assert_close(found, wanted, rtol=0, atol=8 * 2.0**-11 * float(wanted.abs().max()))  # ours are fp16


def test_other_adapters_are_refused(artifact: Path, tmp_path: Path) -> None:
    other = artifact_of(tmp_path / "other", ("int4-g16",), seed=4)
    folder = write_adapter(tmp_path / "a", draw(artifact, 1), artifact)
    with pytest.raises(UserError, match="was trained on another artifact than"):
        load(other, adapter=folder)
    config, tensors = json.loads((folder / CONFIG_FILE).read_text()), load_file(folder / WEIGHTS_FILE)
    first = next(iter(tensors))
    stem = first.partition(".lora_")[0]
    cases = [
        ({"peft_type": "LOHA"}, tensors, "of type LOHA; expected LORA"),
        ({"use_dora": True}, tensors, r"has no lora_magnitude_vector \[16\]"),
        ({"bias": "all"}, tensors, "trains biases"),
        *(
            (values, tensors, r"adapter_config.json: its lora_alpha gives no finite scaling of")
            for values in (
                {"lora_alpha": "8"},
                {"lora_alpha": 1e999},
                {"alpha_pattern": [3]},
                {"alpha_pattern": {"(": 1}},
            )
        ),
        ({"init_lora_weights": "pissa"}, tensors, "initialised by pissa, which changes the base"),
        ({}, tensors | {"x": torch.zeros(1)}, "holds 'x'; expected lora_A and lora_B"),
        ({}, {n: t for n, t in tensors.items() if n != f"{stem}.lora_B.weight"}, "has no lora_A .* beside lora_B"),
        ({}, tensors | {f"{stem}.lora_B.weight": tensors[f"{stem}.lora_B.weight"][:-1]}, "for another model: .* is"),
        (
            {},
            {"gone.lora_A.weight": torch.zeros(1, 2), "gone.lora_B.weight": torch.zeros(2, 1)},
            "no linear module gone",
        ),
        ({}, tensors | {f"{stem}.lora_B.weight": tensors[f"{stem}.lora_B.weight"] * 1e9}, "not finite in fp16"),
    ]
    for changes, held, message in cases:
        (folder / CONFIG_FILE).write_text(json.dumps(config | changes))
        save_file(held, folder / WEIGHTS_FILE)
        with pytest.raises(UserError, match=message):
            load(artifact, adapter=folder)
    (folder / WEIGHTS_FILE).write_bytes(b"cut off")
    with pytest.raises(UserError, match="cannot be read"):
        load(artifact, adapter=folder)
    with pytest.raises(UserError, match="is not an adapter"):
        load(artifact, adapter=tmp_path)


def test_a_head_that_is_the_embedding_is_left_alone(artifact: Path, tmp_path: Path) -> None:
    model, _ = load(artifact, dtype=torch.float32)
    head = model.get_output_embeddings()
    factors = {"lm_head": (torch.ones(head.out_features, 1), torch.ones(1, head.in_features))}
    untied = Adapter(factors, None)
    attach_adapter(model, untied, "a", artifact)
    model, _ = load(artifact, dtype=torch.float32)
    model.get_input_embeddings().weight = model.get_output_embeddings().weight
    with pytest.raises(UserError, match="lm_head shares the embedding's weight"):
        attach_adapter(model, untied, "a", artifact)


def test_an_adapter_is_replaced_only_by_force(artifact: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", draw(artifact, 1), artifact)
    with pytest.raises(UserError, match="or --force"):
        write_adapter(folder, draw(artifact, 2), artifact)
    assert write_adapter(folder, draw(artifact, 2, rank=5), artifact, force=True) == folder
    assert {right.shape[0] for _, right in read_adapter(folder).factors.values()} == {5, 6}


@pytest.mark.parametrize("init", ["zero", "loftq", "lq-lora"])
def test_a_trained_adapter_brings_the_artifact_nearer(artifact: Path, tmp_path: Path, init: str) -> None:
    text = tmp_path / "train.txt"
    text.write_text("abcdefgh ." * 100)
    run = {"rank": 2, "steps": 10, "seqlen": 32, "learning_rate": 1e-2, "kernels": False}
    adapter = finetune(artifact, text=str(text), output=tmp_path / "a", adapter=True, init=init, **run)
    assert sorted(path.name for path in adapter.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    original = load_model(artifact.parent / "model").model.float()
    ids = tiny_tokenizer()("abcdefgh ." * 3, return_tensors="pt")["input_ids"]
    losses = []
    for folder in (None, adapter):
        model, _ = load(artifact, dtype=torch.float32, adapter=folder)
        with torch.no_grad():
            losses.append(float(token_losses(model(input_ids=ids).logits, original(input_ids=ids).logits).mean()))
    assert losses[1] < 0.9 * losses[0]
