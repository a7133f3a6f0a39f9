"""The class that a folder is loaded as: exactly the one in config.json, and a reason for each that is refused."""

import json

import pytest
import torch
import transformers
from tiny import save_tiny
from transformers import (
    BartConfig,
    BartForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from reallm.errors import UserError
from reallm.models.model_class import model_class
from reallm.models.source import load_dense, locate
from reallm.system.scratch import Scratch

TEXT = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 48}
QWEN_TOKENS = {"image_token_id": 290, "video_token_id": 291, "vision_start_token_id": 292, "vision_end_token_id": 293}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
LLAMA, CLIP = TEXT | {"model_type": "llama"}, VISION | {"model_type": "clip_vision_model", "projection_dim": 32}
MISTRAL, PIXTRAL = TEXT | {"model_type": "mistral"}, VISION | {"model_type": "pixtral", "head_dim": 16}
VISION_MODELS = {
    Qwen3_5ForConditionalGeneration: lambda: Qwen3_5Config(
        text_config=TEXT | LINEAR, vision_config=QWEN_VISION | {"num_position_embeddings": 16}, **QWEN_TOKENS
    ),
    Qwen2_5_VLForConditionalGeneration: lambda: Qwen2_5_VLConfig(
        text_config=TEXT | MROPE, vision_config=QWEN_VISION | {"fullatt_block_indexes": [0]}, **QWEN_TOKENS
    ),
    Qwen3VLForConditionalGeneration: lambda: Qwen3VLConfig(
        text_config=TEXT | MROPE,
        vision_config=QWEN_VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        **QWEN_TOKENS,
    ),
    LlavaForConditionalGeneration: lambda: LlavaConfig(text_config=LLAMA, vision_config=CLIP, image_token_index=290),
    Mistral3ForConditionalGeneration: lambda: Mistral3Config(
        text_config=MISTRAL, vision_config=PIXTRAL, image_token_index=290
    ),
    Gemma3ForConditionalGeneration: lambda: Gemma3Config(
        text_config=TEXT,
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=290,
        boi_token_index=291,
        eoi_token_index=292,
    ),
}


def save(folder, kind, config, **changes):
    """Save a random model of `kind`, and change values of its config.json."""
    torch.manual_seed(0)
    model = kind(config).bfloat16()
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return model


@pytest.mark.parametrize("kind", VISION_MODELS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("named", [True, False])
def test_a_model_with_images_loads_as_the_class_it_came_from(kind, named, tmp_path):
    changes = {} if named else {"architectures": None}
    expected = save(tmp_path, kind, VISION_MODELS[kind](), **changes)
    model, notes, _ = load_dense(locate(tmp_path), None, Scratch(tmp_path))
    assert type(model) is kind
    assert notes == ()
    stored, loaded = expected.state_dict(), model.state_dict()
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(stored[name], loaded[name]) for name in stored)


def test_the_text_model_alone_loads_as_itself(tmp_path):
    config = VISION_MODELS[Qwen3_5ForConditionalGeneration]().text_config
    save(tmp_path, Qwen3_5ForCausalLM, config)
    assert type(load_dense(locate(tmp_path), None, Scratch(tmp_path))[0]) is Qwen3_5ForCausalLM


def test_the_decoder_of_a_model_with_an_encoder_may_stand_alone(tmp_path):
    sizes = {"d_model": 48, "encoder_layers": 1, "decoder_layers": 1, "decoder_attention_heads": 2, "vocab_size": 64}
    save(tmp_path, BartForCausalLM, BartConfig(**sizes, encoder_attention_heads=2, decoder_ffn_dim=32))
    assert type(load_dense(locate(tmp_path), None, Scratch(tmp_path))[0]) is BartForCausalLM


def refusal(folder) -> str:
    """The message for `folder`, given before a weight is looked at."""
    for path in folder.glob("*.safetensors"):
        path.write_bytes(b"damaged")
    with pytest.raises(UserError) as caught:
        load_dense(locate(folder), None, Scratch(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_encoder_decoder_model_is_refused_before_its_weights_are_read(tmp_path):
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
    save(tmp_path, T5ForConditionalGeneration, T5Config(**sizes))
    text = refusal(tmp_path)
    assert "T5ForConditionalGeneration: it is an encoder-decoder model" in text


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("BertForSequenceClassification", "does not predict tokens"),
        ("Wav2Vec2ForCTC", "does not predict tokens"),
        ("WhisperForConditionalGeneration", "encoder-decoder"),
        ("BlipForConditionalGeneration", "also needs pixel_values"),
        ("LlamaModel", "no output layer"),
        ("TotallyNewForCausalLM", "no such class, and custom code is never run"),
    ],
)
def test_other_classes_are_refused_by_name_with_the_reason(name, reason, tmp_path):
    folder = save_tiny("llama", tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [name]}))
    text = refusal(folder)
    assert f"unsupported architecture {name}: " in text
    assert reason in text


@pytest.mark.parametrize("name", ["BartForConditionalGeneration", "MarianMTModel", "MT5ForConditionalGeneration"])
def test_encoder_decoder_models_are_refused_whichever_table_they_are_in(name):
    config = getattr(transformers, name).config_class(architectures=[name])
    with pytest.raises(UserError, match=r"encoder-decoder"):
        model_class(config, "x")


@pytest.mark.parametrize(
    "name", ["InternLM3Config", "AudioFlamingo3Config", "Qwen2AudioConfig", "VoxtralConfig", "Llama4TextConfig"]
)
def test_every_model_type_of_a_language_model_has_a_class(name):
    config = getattr(transformers, name)()
    kind, used = model_class(config, "x")
    assert used is config
    config.architectures = [kind.__name__]
    assert model_class(config, "x") == (kind, config)


def test_a_text_class_beside_the_configuration_of_the_whole_model_takes_its_text_part():
    config = VISION_MODELS[Qwen3_5ForConditionalGeneration]()
    config.architectures = ["Qwen3_5ForCausalLM"]
    kind, used = model_class(config, "x")
    assert kind is Qwen3_5ForCausalLM
    assert used is config.text_config


def test_a_class_beside_another_model_type_is_refused(tmp_path):
    folder = save_tiny("llama", tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["GPT2LMHeadModel"]}))
    assert "beside model_type 'llama'" in refusal(folder)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [7]}))
    assert "architectures = [7]" in refusal(folder)
