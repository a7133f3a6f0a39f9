"""The processor of a model that takes images: an artifact has its files, loads with it and answers an image."""

import json

import numpy as np
import pytest
import torch
from artifacts import Made, mixed
from packing import Codes, PackedModel
from PIL import Image
from tiny import save_tiny, tiny_tokenizer
from transformers import AutoImageProcessor, AutoProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

import reallm
from reallm.compilation.compile import compile_plan
from reallm.models.loaded import load_model
from reallm.models.processor import processor_files

TEXT = {
    "model_type": "llama",
    "vocab_size": 262,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TEMPLATE = "{% for message in messages %}<image>{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny model of images and text with its processor."""
    folder = tmp_path_factory.mktemp("llava")
    torch.manual_seed(0)
    config = LlavaConfig(text_config=TEXT, vision_config=VISION, image_token_index=261, image_seq_length=4)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"shortest_edge": 28}, {"height": 28, "width": 28}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "CLIPImageProcessor", "size": size[0], "crop_size": size[1]})
    )
    images = AutoImageProcessor.from_pretrained(folder)
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """An artifact of it whose language part is packed."""
    folder = tmp_path_factory.mktemp("made")
    loaded = load_model(source)
    choose = mixed()
    packed = PackedModel(loaded, lambda matrix: choose(matrix) if "language_model" in matrix.name else None)
    plan = packed.write_plan(folder / "plan.json")
    output = compile_plan(plan, folder / "out", model=loaded, codes=Codes(packed), kernels=False)
    return Made(output, source, plan, loaded, packed)


def picture():
    """A picture of random pixels."""
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 30, 3), dtype=np.uint8))


def test_the_processor_files_of_a_folder(source, tmp_path):
    names = {path.name for path in processor_files(source)}
    assert names == {"processor_config.json", "preprocessor_config.json", "chat_template.jinja"}
    assert processor_files(save_tiny("llama", tmp_path)) == ()


def test_an_artifact_has_the_processor_of_its_source(source, made):
    for path in processor_files(source):
        assert (made.folder / path.name).read_bytes() == path.read_bytes()
    ours, theirs = AutoProcessor.from_pretrained(made.folder), AutoProcessor.from_pretrained(source)
    assert type(ours) is type(theirs) is LlavaProcessor
    assert ours.to_dict() == theirs.to_dict()
    assert ours.chat_template == theirs.chat_template == TEMPLATE
    messages = [{"role": "user", "content": "ab"}]
    texts = [processor.apply_chat_template(messages) for processor in (ours, theirs)]
    assert texts[0] == texts[1] == "<image>ab"
    inputs = [
        processor(images=picture(), text=texts[0], return_tensors="pt", return_token_type_ids=False)
        for processor in (ours, theirs)
    ]
    assert inputs[0].keys() == inputs[1].keys() >= {"input_ids", "pixel_values"}
    assert all(torch.equal(inputs[0][key], inputs[1][key]) for key in inputs[0])


def test_an_artifact_is_verified_with_its_processor_files(made):
    reallm.verify(made.folder)
    assert "preprocessor_config.json" in (made.folder / "manifest.json").read_text()


def test_an_artifact_answers_an_image_as_its_decoded_weights_do(made):
    model, _ = reallm.load(made.folder)
    assert type(model) is LlavaForConditionalGeneration
    processor = AutoProcessor.from_pretrained(made.folder)
    inputs = processor(images=picture(), text="<image> what", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        ours, theirs = model(**inputs).logits, made.replaced()(**inputs).logits
        without = model(**inputs | {"pixel_values": torch.zeros_like(inputs["pixel_values"])}).logits
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))
    assert not torch.allclose(ours, without, rtol=0, atol=1e-3 * float(theirs.abs().max()))
