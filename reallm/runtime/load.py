"""Load an artifact: verify it, then build the model with transformers, ready to run."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reallm.artifacts.bundled_adapters import find_adapter
from reallm.artifacts.directory import is_artifact, read_config
from reallm.artifacts.peft_files import read_adapter
from reallm.artifacts.quantization_config import DecodeMode
from reallm.artifacts.verify import verify as verify_artifact
from reallm.errors import UserError
from reallm.models.source import load_tokenizer, locate

from .attach_adapter import attach_adapter
from .install import prepare, set_decode_mode

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
    """Load an artifact as a transformers model, ready to run.

    Parameters
    ----------
    path
        The folder that `reallm compile` or `reallm finetune` wrote. No code in it is executed.
    device
        Where the model goes, such as "cpu" or "cuda:0".
    dtype
        The dtype of the computation and of unpacked tensors; by default that of the model that was compiled.
    decode
        What to do where packed matrices cannot be multiplied as they are stored (without a compiler on the CPU, or
        without Triton on a GPU): "load" keeps the decoded weights, which are as large as the original model; "call"
        decodes at every call, which is slower and keeps only the packed weights.
    verify
        Hash every byte of the artifact first; otherwise only the headers and sizes of tensors are checked.
    adapter
        A LoRA or DoRA adapter to attach: its name, if it is inside the artifact, or else its folder.

    Returns
    -------
    model : PreTrainedModel
        In evaluation mode.
    tokenizer : PreTrainedTokenizerBase or None
        None if the artifact has no tokenizer.

    Raises
    ------
    UserError
        If `path` is not an artifact, is damaged or was changed, or if the adapter does not fit it.

    Examples
    --------
    >>> model, tokenizer = reallm.load("out")
    >>> model.generate(**tokenizer("a bad", return_tensors="pt"), max_new_tokens=4).shape[0]
    1
    """
    folder = Path(path)
    if not is_artifact(folder):
        raise UserError(f"{folder} is not a reallm artifact; `reallm compile` writes one")
    adapter_folder = None if adapter is None else find_adapter(folder, adapter)
    if verify:
        verify_artifact(folder, adapters=False)
    model: PreTrainedModel = _model_class(folder).from_pretrained(
        folder, dtype="auto" if dtype is None else dtype, local_files_only=True, use_safetensors=True
    )
    if adapter_folder is not None:
        attach_adapter(model, read_adapter(adapter_folder), str(adapter_folder), folder)
    set_decode_mode(model, decode)
    model.to(torch.device(device)).eval()
    prepare(model)
    return model, load_tokenizer(locate(folder))


def _model_class(folder: Path) -> type[PreTrainedModel]:
    """The transformers class that config.json names. Raises UserError if transformers has no such model."""
    names = read_config(folder).get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    kind = getattr(transformers, name, None) if name.isidentifier() else None
    if not isinstance(kind, type) or not issubclass(kind, PreTrainedModel):
        raise UserError(
            f"{folder}/config.json names the architecture {name!r}, which transformers {transformers.__version__} does "
            "not have; install the version that its manifest.json names"
        )
    return kind
