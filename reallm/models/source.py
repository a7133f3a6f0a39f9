"""Loading the transformers model that the user names: a folder, a .gguf file, or a name on the Hugging Face hub."""

from __future__ import annotations

import importlib.util
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from reallm.errors import UserError
from reallm.kernels.storage.layout import CONFIG_FILE

from .checkpoint import main_dtype, read_checkpoint, read_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
DAMAGE = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, struct.error, SafetensorError)
"""Exceptions that transformers raises on a file it cannot use."""


@dataclass(frozen=True)
class Source:
    """A model's files on this machine."""

    label: str
    """The path or hub name as the user wrote it."""
    folder: Path
    gguf_file: str | None = None
    """Name of the file in `folder` for a GGUF model; None for other models."""


def locate(source: str | Path) -> Source:
    """Find `source` on this machine, or download it from the hub. Raises UserError when neither works."""
    label, path = str(source), Path(source).expanduser()
    if path.is_dir():
        return Source(label, path)
    if path.is_file():
        return _locate_file(label, path)
    if path.suffix == ".gguf" or path.is_absolute() or label.startswith((".", "~")) or len(path.parts) > 2:
        raise UserError(f"{label} does not exist; expected a folder with a model, a .gguf file, or a name on the hub")
    try:
        return Source(label, Path(snapshot_download(label, allow_patterns=list(HUB_FILES))))
    except (OSError, HFValidationError, HfHubHTTPError) as error:
        reason = str(error).partition("\n")[0]
        what = f"{label} is not a folder here and cannot be fetched from the hub ({reason})"
        raise UserError(f"{what}; give the folder of a model, or check the name and the connection") from error


def _locate_file(label: str, path: Path) -> Source:
    if path.suffix == ".gguf":
        return Source(label, path.parent, path.name)
    raise UserError(f"{label} is a file of an unknown kind; expected a .gguf file or the folder of a model")


def load_dense(source: Source, dtype: torch.dtype | None) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Load the uncompressed model on the CPU: (model in evaluation mode, notes for the user).

    For the errors see `load_model`.
    """
    if source.gguf_file is not None:
        return _load_gguf(source, dtype or torch.bfloat16)
    config = _read_config(source)
    tensors = read_checkpoint(source.folder)
    stored_dtype = main_dtype(tensors.values(), source.label)
    auto = _auto_class(config, source.label)
    options = {"use_safetensors": True, "trust_remote_code": False}
    return _load(auto, source, config, dtype or stored_dtype, options)


def _load(
    auto: Any, source: Source, config: PretrainedConfig, dtype: torch.dtype, options: dict[str, Any]
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Load with from_pretrained. Raises UserError if the files lack weights, whose values would be random."""
    try:
        model, info = auto.from_pretrained(
            source.folder, config=config, dtype=dtype, local_files_only=True, output_loading_info=True, **options
        )
    except DAMAGE as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{source.label} cannot be loaded as {auto.__name__[9:]}: {reason}") from error
    if missing := sorted(info["missing_keys"]):
        what = f"{len(missing)} tensors of {type(model).__name__} are not in the file, such as {missing[0]}"
        raise UserError(f"{source.label}: {what}; their values would be random: get the complete model")
    notes: tuple[str, ...] = ()
    if unexpected := sorted(info["unexpected_keys"]):
        notes = (
            f"{len(unexpected)} stored tensors do not belong to the model and are left out, such as {unexpected[0]}",
        )
    return model.eval(), notes


def _read_config(source: Source) -> PretrainedConfig:
    """Read the configuration in a folder. Raises UserError when it says that the weights are quantised."""
    path = source.folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{source.label} has no {CONFIG_FILE}; expected the folder of a transformers model")
    quantised = read_json(path).get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        if method == "reallm":
            raise UserError(f"{source.label} was already compressed by reallm; give the model it was made from")
        raise UserError(f"{source.label} is already quantised ({method}); give the original, unquantised model")
    try:
        return AutoConfig.from_pretrained(source.folder, trust_remote_code=False, local_files_only=True)
    except DAMAGE as error:
        reason = str(error).strip().partition("\n")[0]
        known = f"a configuration that transformers {transformers.__version__} knows"
        raise UserError(f"{path} is not {known}: {reason}") from error


def _auto_class(config: PretrainedConfig, label: str) -> Any:
    """AutoModelForCausalLM or AutoModelForMaskedLM, by the configuration's architectures or else by its model type."""
    causal, masked = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()), set(MODEL_FOR_MASKED_LM_MAPPING_NAMES.values())
    named = set(config.architectures or ())
    if named & causal:
        return AutoModelForCausalLM
    if named & masked:
        return AutoModelForMaskedLM
    if not named and config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return AutoModelForMaskedLM
    if not named and config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForCausalLM
    architecture = ", ".join(sorted(named)) or config.model_type
    expected = f"a causal or masked language model of transformers {transformers.__version__}"
    raise UserError(
        f"{label} has the unsupported architecture {architecture}; expected {expected}, without custom code"
    )


def _load_gguf(source: Source, dtype: torch.dtype) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Load a GGUF file: the quantised weights are unpacked to `dtype`.

    The quantisation is removed from the configuration, so that the model can be saved as an ordinary one.
    """
    path = source.folder / str(source.gguf_file)
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{source.label} needs the package gguf; install it: pip install 'reallm[gguf]'")
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise UserError(f"{source.label} does not begin with GGUF; it is damaged or not a GGUF file: get it again")
    options: dict[str, Any] = {"gguf_file": source.gguf_file}
    if hasattr(transformers, "GgufConfig"):  # later releases may keep the blocks packed unless told not to
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        config = AutoConfig.from_pretrained(source.folder, gguf_file=source.gguf_file, local_files_only=True)
    except DAMAGE as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{source.label} cannot be read and may be truncated ({reason}); get the file again") from error
    model, notes = _load(AutoModelForCausalLM, source, config, dtype, options)
    leftovers = ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "quantization_method"))
    for owner, attribute in leftovers:
        if hasattr(owner, attribute):
            delattr(owner, attribute)
    model.is_quantized = False
    model.config.architectures = [type(model).__name__]
    return model, (*notes, f"{source.label} holds quantised weights: unpacked to {dtype}, they are the reference")


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer stored with the model; None if there is none. Raises UserError if it is damaged."""
    options: dict[str, Any] = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    if not source.gguf_file and not any((source.folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False, local_files_only=True, **options)
    except Exception as error:  # the tokenizers library raises bare Exception
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"the tokenizer of {source.label} cannot be loaded: {reason}") from error
