"""Inputs with a random picture for vision-language models, made from the configuration instead of a processor."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from .sizes import IMAGE

Inputs = dict[str, Any]
GRID = 4
"""Patches along each side of the picture, for models that cut it into patches beforehand."""


class NoPictureError(Exception):
    """The inputs that a model needs for a picture are not known."""


def with_picture(model: PreTrainedModel, ids: Tensor, seed: int = 0) -> tuple[Tensor, Inputs]:
    """Token ids [1, n] with the model's image tokens in them, and the other inputs, for one random picture.

    Raises NoPictureError if the model's inputs are of an unknown kind.
    """
    accepted = set(inspect.signature(model.forward).parameters)
    generator = torch.Generator().manual_seed(seed)
    pixels = _pixels(model, accepted, generator)
    token = _image_token(model.config)
    owner = next((part for part in (model, model.base_model) if hasattr(part, "get_image_features")), None)
    if token is None or owner is None:
        return ids, pixels
    features = _features(owner, pixels)
    marked = torch.cat([ids[:, :4], torch.full((1, features), token), ids[:, 4:]], dim=1)
    types = (marked == token).int()
    extra = {name: types for name in ("mm_token_type_ids", "token_type_ids") if name in accepted}
    return marked, pixels | extra


def _pixels(model: PreTrainedModel, accepted: set[str], generator: torch.Generator) -> Inputs:
    """The inputs that hold the picture."""
    kind = model.config.model_type
    if "pixel_values" not in accepted:
        raise NoPictureError(f"{type(model).__name__} takes no pixel_values")
    vision = _vision_config(model.config)
    size = _first(vision, "image_size", default=IMAGE)
    patch = _first(vision, "patch_size", default=8)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if "image_grid_thw" in accepted:
        temporal = _first(vision, "temporal_patch_size", "patch_temporal", default=1)
        channels = _first(vision, "num_channels", "in_channels", "in_chans", default=3)
        shape = {"kimi_k25": (GRID * GRID, 3, patch, patch), "paddleocr_vl": (GRID * GRID, 3, patch, patch)}
        pixels = noise(*shape.get(kind, (GRID * GRID, channels * temporal * patch * patch)))
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, GRID, GRID]])}
    if "image_position_ids" in accepted:
        rows, cols = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
        positions = torch.stack([cols, rows], dim=-1).reshape(1, GRID * GRID, 2)
        return {"pixel_values": noise(1, GRID * GRID, 3 * patch * patch).sigmoid(), "image_position_ids": positions}
    if "spatial_shapes" in accepted:
        shapes, mask = torch.tensor([[GRID, GRID]]), torch.ones(1, GRID * GRID, dtype=torch.long)
        pixels = noise(1, GRID * GRID, 3 * patch * patch)
        return {"pixel_values": pixels, "spatial_shapes": shapes, "pixel_attention_mask": mask}
    if "aspect_ratio_ids" in accepted:
        tiles = int(vision.max_num_tiles)
        mask = torch.tensor([[[1] + [0] * (tiles - 1)]])
        pixels = noise(1, 1, tiles, 3, size, size)
        return {"pixel_values": pixels, "aspect_ratio_ids": torch.tensor([[1]]), "aspect_ratio_mask": mask}
    if "pixel_attention_mask" in accepted:
        mask = torch.ones(1, 1, size, size, dtype=torch.bool)
        return {"pixel_values": noise(1, 1, 3, size, size), "pixel_attention_mask": mask}
    if getattr(model.config, "image_grid_pinpoints", None):
        sizes = torch.tensor([[size, 2 * size]])
        return {"pixel_values": noise(1, 3, 3, size, size), "image_sizes": sizes}
    inputs: Inputs = {"pixel_values": noise(1, 3, size, size)}
    if "image_sizes" in accepted and kind in ("mistral3", "mistral_large4", "lighton_ocr", "emu3"):
        inputs["image_sizes"] = torch.tensor([[size, size]])
    if "high_res_pixel_values" in accepted:
        high = _first(model.config.high_res_vision_config, "image_size", default=IMAGE)
        inputs["high_res_pixel_values"] = noise(1, 3, high, high)
    return inputs


def _vision_config(config: PretrainedConfig) -> Any:
    """The configuration of the vision tower, or the whole one if there is no part for it."""
    part = getattr(config, "vision_config", None) or getattr(
        getattr(config, "thinker_config", None), "vision_config", None
    )
    return config if part is None else part


def _first(config: Any, *names: str, default: int) -> int:
    """The first of the settings `names` that is present; of a pair, the first number."""
    for name in names:
        value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        if isinstance(value, (list, tuple)):
            value = value[0]
        if isinstance(value, int):
            return value
    return default


def _image_token(config: PretrainedConfig) -> int | None:
    for name in ("image_token_id", "image_token_index", "image_patch_id"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    vocabulary = getattr(config, "vocabulary_map", None) or {}
    return vocabulary.get("<image>")


def _features(model: Any, pixels: Inputs) -> int:
    """Number of embeddings that stand for the picture."""
    accepted = inspect.signature(model.get_image_features).parameters
    with torch.no_grad():
        output = model.get_image_features(**{key: value for key, value in pixels.items() if key in accepted})
    found = getattr(output, "pooler_output", output)
    found = output.last_hidden_state if found is None else found
    tensors = found if isinstance(found, (list, tuple)) else [found]
    return sum(tensor.numel() // tensor.shape[-1] for tensor in tensors)
