"""Opening whatever the user names for running it: an artifact of ours, or any transformers model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reallm.artifacts.directory import is_artifact
from reallm.errors import UserError
from reallm.models.loaded import load_model
from reallm.models.sizes import Sizes, artifact_sizes, model_sizes

from .load import load

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class RunnableModel:
    """A model ready to run, its tokenizer and what it weighs."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sizes: Sizes


def open_model(
    path: str | Path, dtype: str | None = "float32", device: str = "cpu", adapter: str | Path | None = None
) -> RunnableModel:
    """The model at `path` in `dtype` ("float32", ...; None: its own) on `device`; an artifact with `adapter`, if given.

    Raises UserError when it cannot be had, or without a tokenizer, which everything that runs a model needs.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: expected {', '.join(DTYPES)}")
    kind = DTYPES[dtype] if dtype else None
    if is_artifact(path):
        model, tokenizer = load(path, device=_device(device), dtype=kind, adapter=adapter)
        sizes = artifact_sizes(Path(path))
    elif adapter is not None:
        raise UserError(f"--adapter: {path} is no artifact of reallm; load its adapters with peft")
    else:
        loaded = load_model(path)
        tokenizer, sizes = loaded.tokenizer, model_sizes(loaded)
        model = loaded.model.to(device=_device(device), dtype=kind)
    if tokenizer is None:
        raise UserError(f"{path} has no tokenizer; put its tokenizer files into the folder")
    return RunnableModel(model.eval(), tokenizer, sizes)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        reason = str(error).partition("\n")[0]
        raise UserError(f"--device {name} cannot be used here ({reason}); leave it out for the CPU") from None
    return device
