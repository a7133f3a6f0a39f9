"""Load the model that the user names, ready to run: an artifact, or any transformers model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reallm.artifacts.copy_sizes import copy_sizes
from reallm.artifacts.find import find_artifact, is_saved_copy
from reallm.errors import UserError
from reallm.models.loaded import load_model
from reallm.models.sizes import Sizes, artifact_sizes, model_sizes
from reallm.system.device import parse_device
from reallm.system.torch_dtypes import FLOAT_DTYPES, torch_name

from .load import load

DTYPES = {torch_name(dtype): dtype for dtype in FLOAT_DTYPES.values()}


@dataclass(frozen=True)
class RunnableModel:
    """A model ready to run, its tokenizer and its sizes."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sizes: Sizes


def open_model(
    path: str | Path, dtype: str | None = "float32", device: str = "cpu", adapter: str | Path | None = None
) -> RunnableModel:
    """Load the model at `path`, which is an artifact, model folder, .gguf file or hub name.

    `dtype` is "float32", "bfloat16", "float16", or None for the model's own; `adapter` is an adapter for an artifact,
    as in `load`. Raises UserError if the model cannot be loaded or has no tokenizer.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: expected {', '.join(DTYPES)}")
    torch_dtype = DTYPES[dtype] if dtype else None
    artifact = find_artifact(path)
    if artifact is not None:
        model, tokenizer = load(artifact, device=parse_device(device), dtype=torch_dtype, adapter=adapter)
        sizes = copy_sizes(artifact) if is_saved_copy(artifact) else artifact_sizes(artifact)
    elif adapter is not None:
        raise UserError(f"--adapter: {path} is not a reallm artifact; load its adapters with peft")
    else:
        loaded = load_model(path)
        tokenizer, sizes = loaded.tokenizer, model_sizes(loaded)
        model = loaded.model.to(device=parse_device(device), dtype=torch_dtype)
    if tokenizer is None:
        raise UserError(f"{path} has no tokenizer; put its tokenizer files into the folder")
    return RunnableModel(model.eval(), tokenizer, sizes)
