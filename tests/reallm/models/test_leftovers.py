"""Stored tensors that the model has no place for: whole parts are left out with a note, needed ones are an error."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny

from reallm.errors import UserError
from reallm.models.loaded import load_model

LAYER = "model.layers.1"


@pytest.fixture
def folder(tmp_path):
    return save_tiny("llama", tmp_path)


def add(folder, *names, shape=(3,)):
    tensors = load_file(folder / "model.safetensors") | {name: torch.ones(shape) for name in names}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "names",
    [
        ("model.vision_tower.patch.weight",),
        ("mtp.layers.0.mlp.up_proj.weight", "mtp.norm.weight"),
        ("model.layers.2.eh_proj.weight", "model.layers.2.mlp.up_proj.weight"),
        ("score.weight",),
        ("model.embed_tokens.position_ids",),
    ],
)
def test_whole_parts_and_computed_buffers_are_left_out_with_a_note(folder, names):
    before = load_model(folder).digest
    add(folder, *names)
    loaded = load_model(folder)
    (note,) = loaded.notes
    assert f"{len(names)} stored tensors do not belong to the model" in note
    assert ".".join(names[0].split(".")[:3]) in note
    assert loaded.digest == before


@pytest.mark.parametrize(
    "name",
    [
        f"{LAYER}.mlp.up_proj.bias",
        f"{LAYER}.mlp.up_proj.scale",
        f"{LAYER}.mlp.up_proj.lora_A.weight",
        f"{LAYER}.self_attn.q_norm.weight",
        f"{LAYER}.self_attn.sinks",
        "model.norm.bias",
        "lm_head.bias",
        "model.embed_tokens.scale",
    ],
)
def test_a_tensor_inside_a_part_that_is_used_is_an_error(folder, name):
    add(folder, name)
    with pytest.raises(UserError) as caught:
        load_model(folder)
    assert f"the stored tensor {name} belongs to " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fewer_layers_than_the_weights_have_are_an_error(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 1}))
    with pytest.raises(UserError, match=r"hold model\.layers\.1, but by config\.json there are only 1"):
        load_model(folder)
