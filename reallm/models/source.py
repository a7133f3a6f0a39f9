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
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from reallm.errors import UserError
from reallm.kernels.storage.layout import CONFIG_FILE, WEIGHTS_FILE
from reallm.system.scratch import Scratch

from .checkpoint import main_dtype, read_checkpoint, read_json
from .large import fits_in_memory, kept_in_files, stored_weights
from .leftovers import leftover_notes
from .model_class import model_class
from .quantised.find import KEYS, find_schemes
from .quantised.unpack import UnpackedWeights, unpacked_dtype
from .sentence_encoder import encoder_class, fill_pooler
from .setting_types import GENERATION_FILE, check_generation
from .settings_errors import check_config, settings_errors

ADAPTER_CONFIG = "adapter_config.json"
PACKED_VALUES = 2
"""Weights in one stored value of a quantised checkpoint, or in a byte of a GGUF file, roughly (4 bits)."""
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


def load_dense(
    source: Source, dtype: torch.dtype | None, scratch: Scratch
) -> tuple[PreTrainedModel, tuple[str, ...], Scratch | None]:
    """Load the uncompressed model on the CPU: (model in evaluation mode, notes for the user, `scratch` or None).

    The last is `scratch` for a model that does not fit into memory: its weights stay in its files, or in `scratch`
    where they are converted. For the errors see `load_model`.
    """
    if source.gguf_file is not None:
        nbytes = (source.folder / source.gguf_file).stat().st_size
        place = None if fits_in_memory(PACKED_VALUES * nbytes) else scratch
        with kept_in_files(place):
            return *_load_gguf(source, dtype or torch.bfloat16), place
    settings = _read_settings(source)
    schemes = find_schemes(settings, source.folder, source.label)
    config = _read_config(source)
    kind, config = model_class(config, source.label, encoder_class(config, source.folder))
    tensors = read_checkpoint(source.folder)
    check_config(source.folder)
    options: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False}
    weights = UnpackedWeights(tensors, schemes, source.label)
    if schemes and not weights.packed:
        raise UserError(
            f"{source.label}: config.json says that the weights are quantised ({schemes[0].method}), but none is; if "
            "these are the original weights, remove quantization_config from config.json"
        )
    values = stored_weights(tensors.values()) * (PACKED_VALUES if schemes else 1)
    place = None if fits_in_memory(values) else scratch
    with kept_in_files(place):
        if schemes:
            return *_load_quantised(kind, source, config, weights, dtype or unpacked_dtype(settings), place), place
        return *_load(kind, source, config, dtype or main_dtype(tensors.values(), source.label), options), place


def _load(
    kind: Any, source: Source, config: PretrainedConfig, dtype: torch.dtype, options: dict[str, Any]
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Load with from_pretrained. Raises UserError if the files lack weights, whose values would be random."""
    folder = None if "state_dict" in options else source.folder
    name = kind.__name__.removeprefix("AutoModel")
    with settings_errors(None if source.gguf_file else source.folder, f"{source.label} cannot be loaded as {name}"):
        model, info = kind.from_pretrained(
            folder, config=config, dtype=dtype, local_files_only=True, output_loading_info=True, **options
        )
        if folder is None and model.can_generate() and (source.folder / GENERATION_FILE).is_file():
            model.generation_config = GenerationConfig.from_pretrained(source.folder, local_files_only=True)
        if model.can_generate():
            check_generation(model.generation_config)
    missing, notes = fill_pooler(model, sorted(info["missing_keys"]))
    if missing:
        what = f"{len(missing)} tensors that config.json asks for are not in the weights files, such as {missing[0]}"
        raise UserError(f"{source.label}: {what}; their values would be random: get the complete model")
    return model.eval(), (*notes, *leftover_notes(model, info["unexpected_keys"], source.label))


def _load_quantised(
    kind: Any,
    source: Source,
    config: PretrainedConfig,
    weights: UnpackedWeights,
    dtype: torch.dtype,
    scratch: Scratch | None,
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Unpack quantised weights to `dtype`, in files if there is a `scratch`, and load the model as an ordinary one."""
    model, notes = _load(kind, source, config, dtype, {"state_dict": weights.read(dtype, scratch)})
    model.name_or_path = model.config.name_or_path = str(source.folder)
    methods = ", ".join(sorted({scheme.method for scheme, _ in weights.packed.values()}))
    if weights.dropped:
        what = f"{len(weights.dropped)} scales of quantised activations, such as {weights.dropped[0]}, are left out"
        notes = (*notes, f"{what}: activations are computed in {dtype}")
    return model, (*notes, _unpacked_note(source, methods, dtype))


def _unpacked_note(source: Source, method: str, dtype: torch.dtype) -> str:
    return f"{source.label} holds quantised weights ({method}): unpacked to {dtype}, they are the reference"


def _read_settings(source: Source) -> dict[str, Any]:
    """The JSON object in config.json. Raises UserError if it cannot be read."""
    path = source.folder / CONFIG_FILE
    if not path.is_file():
        if (source.folder / ADAPTER_CONFIG).is_file():
            raise UserError(f"{source.label} holds an adapter ({ADAPTER_CONFIG}); give the model that it was made for")
        raise UserError(f"{source.label} has no {CONFIG_FILE}; expected the folder of a transformers model")
    if (source.folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{source.label} holds a model and an adapter ({ADAPTER_CONFIG}) in one folder; merge the adapter into the "
            "model, or move it to a folder of its own"
        )
    settings = read_json(path)
    if not isinstance(kind := settings.get("model_type", ""), str):
        raise UserError(f"{path}: model_type = {kind!r} cannot be used; expected a name, such as 'llama'")
    weights, method = settings.get("transformers_weights"), settings.get("quantization_config")
    is_artifact = isinstance(method, dict) and method.get("quant_method") == "reallm"  # refused by `find_schemes`
    if weights not in (None, WEIGHTS_FILE) and not is_artifact:
        raise UserError(
            f"{path}: transformers_weights = {weights!r} names another weights file; expected {WEIGHTS_FILE} or its "
            "shards: rename the file and remove the key"
        )
    return settings


def _read_config(source: Source) -> PretrainedConfig:
    """Read the configuration in a folder, without what it says about quantised weights. Raises UserError."""
    path = source.folder / CONFIG_FILE
    problem = f"{path} is not a configuration that transformers {transformers.__version__} knows"
    with settings_errors(source.folder, problem):
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False, local_files_only=True)
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        for key in KEYS:
            if hasattr(part, key):
                delattr(part, key)
    return config


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
    return model, (*notes, _unpacked_note(source, "GGUF", dtype))
