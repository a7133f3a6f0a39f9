"""A tiny random LLaVA with its processor, and texts with pictures for it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny import _LLAMA, VOCAB, tiny_tokenizer
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

IMAGE_TOKEN = "<image>"
SIZE, PATCH = 28, 14


def save_tiny_llava(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Save the model, its tokenizer and its processor in `folder`."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=16,
    )
    text = LlamaConfig(**_LLAMA | {"vocab_size": VOCAB + 1})
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=VOCAB, vision_feature_select_strategy="full"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    tokenizer.chat_template = None
    logging.getLogger("transformers").setLevel(logging.ERROR)
    images = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    processor = LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=PATCH, vision_feature_select_strategy="full"
    )
    processor.num_additional_image_tokens = 1
    processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_image_texts(folder: Path, count: int = 3) -> Path:
    """Save pictures of random pixels and a file of texts with them; returns the file."""
    random = np.random.default_rng(0)
    lines = []
    for number in range(count):
        Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "text": f"picture number {number} of a cat on a mat"}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "pairs.jsonl"
