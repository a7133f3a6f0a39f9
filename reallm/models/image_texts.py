"""Texts with images that a model is calibrated on: read from a file and encoded by the model's own processor.

The file has one JSON object per line: {"image": "cat.png", "text": "A cat on a mat."}. `image` may be a list; paths are
relative to the file. Where the processor has a chat template, images and text become one message of a user.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor, PreTrainedModel

from reallm.errors import UserError

from .loaded import LoadedModel
from .source import locate

_TOKEN_SETTINGS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
"""Names of the settings that hold the ids of tokens that stand for parts of an image."""


@dataclass(frozen=True)
class ImageTexts:
    """Texts with images as a model's processor encodes them."""

    inputs: Sequence[Mapping[str, Tensor]]
    """For each text, the tensors that the model is called with, `input_ids` [1, seqlen] among them."""
    placeholders: Tensor
    """The ids of the tokens that stand for parts of an image, int64 [k]."""

    def digest(self) -> str:
        """sha256 of all inputs."""
        digest = hashlib.sha256()
        for each in self.inputs:
            for name, tensor in sorted(each.items()):
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
                digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def read_image_texts(path: Path, loaded: LoadedModel) -> ImageTexts:
    """Read the texts with images in `path` and encode them with the processor of the model.

    Raises UserError, naming the file and the line, for a line, an image or a text that cannot be used, and for a model
    without a processor for images.
    """
    processor = _processor(loaded)
    inputs = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--images {path} cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            inputs.append(_encoded(line, f"{path}, line {number}", path.parent, processor, loaded.model))
    if not inputs:
        raise UserError(f'--images {path} is empty; expected lines such as {{"image": "cat.png", "text": "A cat."}}')
    return ImageTexts(inputs, torch.tensor(sorted(_placeholders(processor, loaded.model))))


def _processor(loaded: LoadedModel) -> Any:
    if not loaded.processor_files:
        raise UserError(f"--images: {loaded.source} has no processor for images (processor_config.json); leave it out")
    if importlib.util.find_spec("PIL") is None:
        raise UserError("--images needs the package pillow; install it: pip install pillow")
    try:
        return AutoProcessor.from_pretrained(
            locate(loaded.source).folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # processors raise anything
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"the processor of {loaded.source} cannot be loaded: {reason}") from error


def _encoded(line: str, where: str, folder: Path, processor: Any, model: PreTrainedModel) -> dict[str, Tensor]:
    """The inputs for one line, those that the model's forward takes."""
    images, text = _parsed(line, where)
    pictures = [_picture(folder / name, where) for name in images]
    content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": text}]
    try:
        if getattr(processor, "chat_template", None):
            prompt = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        else:
            prompt = getattr(processor, "image_token", "") * len(pictures) + text
        encoded = processor(text=[prompt], images=[pictures], return_tensors="pt")
    except Exception as error:  # processors and templates raise anything
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{where}: the model's processor cannot encode this: {reason}") from error
    accepted = inspect.signature(model.forward).parameters
    return {name: value for name, value in encoded.items() if name in accepted and isinstance(value, Tensor)}


def _parsed(line: str, where: str) -> tuple[list[str], str]:
    """(paths of the images, text) of one line."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    names = value.get("image") if isinstance(value, dict) else None
    names = [names] if isinstance(names, str) else names
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or not isinstance(text, str):
        raise UserError(f'{where}: expected {{"image": "cat.png", "text": "A cat."}}')
    return names, text


def _picture(path: Path, where: str) -> Any:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: the image {path} cannot be read: {error}") from None


def _placeholders(processor: Any, model: PreTrainedModel) -> set[int]:
    owners = (processor, model.config, model.config.get_text_config())
    found = {getattr(owner, name, None) for owner in owners for name in _TOKEN_SETTINGS}
    return {token for token in found if isinstance(token, int)}
