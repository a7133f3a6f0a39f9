"""Load the model that the user names, ready to run: an artifact, or any transformers model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reallm.artifacts.copy_sizes import copy_sizes
from reallm.artifacts.find import find_artifact, is_saved_copy
from reallm.errors import UserError
from reallm.models.conversion import run_block_by_block
from reallm.models.large import fits_in_memory, kept_in_files
from reallm.models.loaded import LoadedModel, load_model
from reallm.models.matrices import find_blocks
from reallm.models.sizes import Sizes, artifact_sizes, model_sizes
from reallm.system.device import parse_device
from reallm.system.scratch import Scratch
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
        sizes = copy_sizes(artifact) if is_saved_copy(artifact) else artifact_sizes(artifact)
        model, tokenizer = _load_artifact(artifact, sizes, parse_device(device), torch_dtype, adapter)
    elif adapter is not None:
        raise UserError(f"--adapter: {path} is not a reallm artifact; load its adapters with peft")
    else:
        loaded = load_model(path)
        tokenizer, sizes = loaded.tokenizer, model_sizes(loaded)
        model = _on_device(loaded, parse_device(device), torch_dtype)
    if tokenizer is None:
        raise UserError(f"{path} has no tokenizer; put its tokenizer files into the folder")
    return RunnableModel(model.eval(), tokenizer, sizes)


def _load_artifact(
    folder: Path, sizes: Sizes, device: torch.device, dtype: torch.dtype | None, adapter: str | Path | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load an artifact; one that does not fit into memory stays in its files and is converted block by block."""
    if device.type != "cpu" or fits_in_memory(sizes.file_bytes // 2):
        return load(folder, device=device, dtype=dtype, adapter=adapter)
    scratch = Scratch.default()
    with kept_in_files(scratch):
        model, tokenizer = load(folder, decode="call", adapter=adapter)
    if dtype is not None:
        run_block_by_block(model, find_blocks(model), dtype, scratch)
    return model, tokenizer


def _on_device(loaded: LoadedModel, device: torch.device, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model in `dtype` on `device`; on the CPU, one that does not fit into memory is converted block by block."""
    if loaded.scratch is None or device.type != "cpu":
        return loaded.model.to(device=device, dtype=dtype)
    if dtype is not None:
        run_block_by_block(loaded.model, loaded.blocks, dtype, loaded.scratch)
    return loaded.model
