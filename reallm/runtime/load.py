"""Load an artifact: verified first, then through transformers, ready to run."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reallm.artifacts.bundled_adapters import find_adapter
from reallm.artifacts.directory import is_artifact, read_config
from reallm.artifacts.peft_files import read_adapter
from reallm.artifacts.verify import verify as verify_artifact
from reallm.errors import UserError
from reallm.models.source import load_tokenizer, locate

from .attach_adapter import attach_adapter
from .install import prepare, set_decode_mode
from .packed import DecodeMode

__all__ = ["is_artifact", "load"]


def load(
    path: Path | str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    decode: DecodeMode = "load",
    verify: bool = True,
    adapter: Path | str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model in evaluation mode, and its tokenizer if the artifact has one.

    `dtype` is what it computes in (default: the dtype it was compiled from). On the CPU
    matrices are multiplied as they are packed; where that cannot be done, `decode` "load" keeps the decoded weights, as
    large as the original model, and "call" keeps only the packed ones and decodes at every call. `verify` hashes every
    byte first; without it only headers and sizes are checked. `adapter` is a LoRA or DoRA adapter to run it with
    (`adapters`): its folder, or its name in the artifact's own folder of adapters, where it is looked for first.
    Nothing in the folders is executed. Raises UserError.
    """
    folder = Path(path)
    if not is_artifact(folder):
        raise UserError(f"{folder} is no artifact of reallm; `reallm compile` writes one")
    place = None if adapter is None else find_adapter(folder, adapter)
    if verify:
        verify_artifact(folder, adapters=False)
    model: PreTrainedModel = _model_class(folder).from_pretrained(
        folder, dtype="auto" if dtype is None else dtype, local_files_only=True, use_safetensors=True
    )
    if place is not None:
        attach_adapter(model, read_adapter(place), str(place), folder)
    set_decode_mode(model, decode)
    model.to(torch.device(device)).eval()
    prepare(model)
    return model, load_tokenizer(locate(folder))


def _model_class(folder: Path) -> type[PreTrainedModel]:
    """The transformers class that config.json names. Raises UserError for none, or one from elsewhere."""
    names = read_config(folder).get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    found = getattr(transformers, name, None) if name.isidentifier() else None
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        raise UserError(f"{folder}/config.json names the architecture {name!r}, which this transformers does not have")
    return found
