"""Load an artifact: verify it, then build the model with transformers, ready to run."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reallm.artifacts.architecture import model_class_of
from reallm.artifacts.bundled_adapters import find_adapter
from reallm.artifacts.find import require_artifact
from reallm.artifacts.peft_files import read_adapter
from reallm.artifacts.quantization_config import DecodeMode
from reallm.artifacts.verify import verify as verify_artifact
from reallm.models.setting_types import check_generation
from reallm.models.settings_errors import check_config, settings_errors
from reallm.models.source import locate
from reallm.models.tokenizer import load_tokenizer
from reallm.system.progress import without_bars_in_files

from .attach_adapter import attach_adapter
from .install import prepare, set_decode_mode


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
        The folder that `reallm compile` or `reallm finetune` wrote, its name on the Hugging Face hub, or a folder to
        which transformers saved it. No code in it is executed.
    device
        Where the model goes, such as "cpu" or "cuda:0".
    dtype
        The dtype of the computation and of unpacked tensors; by default that of the model that was compiled.
    decode
        What to do where packed matrices cannot be multiplied as they are stored (without a compiler on the CPU, or
        without Triton on a GPU): "load" keeps the decoded weights, which are as large as the original model; "call"
        decodes at every call, which is slower and keeps only the packed weights.
    verify
        Hash every byte of the artifact first; otherwise only the headers and sizes of tensors are checked. A folder
        that transformers saved has no hashes: its values are only checked for being valid.
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
    folder = require_artifact(path)
    adapter_folder = None if adapter is None else find_adapter(folder, adapter)
    if verify:
        verify_artifact(folder, adapters=False)
    model = _from_pretrained(folder, dtype)
    if adapter_folder is not None:
        attach_adapter(model, read_adapter(adapter_folder), str(adapter_folder), folder)
    set_decode_mode(model, decode)
    model.to(torch.device(device)).eval()
    prepare(model)
    return model, load_tokenizer(locate(folder))


def _from_pretrained(folder: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """Load the model with transformers. Raises UserError, in one line, for a configuration that it cannot use."""
    kind = model_class_of(folder)
    check_config(folder)
    with settings_errors(folder, f"{folder} cannot be loaded as {kind.__name__}"), without_bars_in_files():
        model: PreTrainedModel = kind.from_pretrained(
            folder, dtype="auto" if dtype is None else dtype, local_files_only=True, use_safetensors=True
        )
        if model.can_generate():
            check_generation(model.generation_config)
    return model
