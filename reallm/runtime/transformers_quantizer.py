"""The quantizer for transformers: after `import reallm`, from_pretrained, generate and save_pretrained take artifacts.

transformers builds the model without allocating memory (on "meta"), lets the quantizer replace modules, reads the files
and calls the quantizer again. Before reading, the files' headers are compared with what the modules expect; after
reading, every packed tensor must have come from a file. Otherwise loading fails: a packed weight is never random.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from reallm.artifacts.quantization_config import METHOD, QuantizationRecord, read_quantization
from reallm.errors import UserError
from reallm.kernels.storage.layout import LayoutError
from reallm.kernels.storage.safetensors_reader import StoredTensor, read_header

from .install import install, packed_tensors


class ReallmConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is untyped here
    """`quantization_config` of config.json, checked at construction."""

    def __init__(self, record: QuantizationRecord) -> None:
        self.quant_method = METHOD
        self.record = record

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, object], return_unused_kwargs: bool = False, **unused: object) -> Any:
        """Check and wrap the dictionary of config.json. Raises UserError."""
        config = cls(read_quantization(config_dict))
        return (config, unused) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The dictionary for config.json."""
        return self.record.model_dump(mode="json")


class ReallmQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is untyped here
    """Replaces the packed modules of an artifact, and checks that all of their fields are loaded."""

    requires_calibration = True
    quantization_config: ReallmConfig

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """True: norms, biases and low-rank factors can be trained without adapters (see `runtime.training`)."""
        return True

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """No conversions: an artifact's tensors have the names of the modules that hold them."""
        return []

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
        checkpoint_files: Sequence[str] | None = None,
        **unused: object,
    ) -> None:
        record = self.quantization_config.record
        with torch.device("meta"):
            install(model, record, dtype or torch.get_default_dtype())
        _retie(model, record)
        if checkpoint_files is not None:
            check_headers(model, [Path(file) for file in checkpoint_files])

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **unused: object) -> PreTrainedModel:
        for name, raw in packed_tensors(model).items():
            if not getattr(raw, "_is_hf_initialized", False) or raw.is_meta:
                raise UserError(
                    f"tensor {name!r} was not loaded: its file is incomplete, or `device_map` sent it to disk; "
                    "copy the artifact again, or load it without offloading"
                )
        if model.can_generate():
            from .step.generate import use_step  # imports transformers' models, which import this module

            use_step(model)
        return model


def _retie(model: PreTrainedModel, record: QuantizationRecord) -> None:
    """Remove the model's ties of weights that are now packed, and add the record's aliases as ties."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    ties = {**model.all_tied_weights_keys, **record.aliases}
    model.all_tied_weights_keys = {
        target: source for target, source in ties.items() if target in names and source in names
    }


def read_headers(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """The tensors of all weights files by name. Raises UserError for a damaged header or a name in two files."""
    stored: dict[str, StoredTensor] = {}
    for file in files:
        try:
            header = read_header(file)
        except LayoutError as error:
            raise UserError(str(error)) from None
        if repeated := stored.keys() & header.keys():
            raise UserError(f"{file}: tensor {min(repeated)!r} is in another file too; copy the artifact again")
        stored |= header
    return stored


def check_headers(model: PreTrainedModel, files: Sequence[Path]) -> None:
    """Compare the files' headers with the model, before any data is read or allocated.

    Raises UserError unless every field is stored as U8 with its exact size, and every other tensor with its shape.
    """
    stored = read_headers(files)
    expected = packed_tensors(model)
    for name, raw in expected.items():
        tensor = _find(stored, name, model.base_model_prefix)
        if tensor is None:
            raise UserError(f"{files[0]}: tensor {name!r} is missing; copy or compile the artifact again")
        if tensor.dtype != "U8" or tensor.shape != tuple(raw.shape):
            raise UserError(
                f"{tensor.path}: tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, expected U8 {list(raw.shape)}"
            )
    complete = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
    _check_others(model, stored, set(expected), complete)


def _check_others(model: PreTrainedModel, stored: Mapping[str, StoredTensor], packed: set[str], complete: bool) -> None:
    """Check the tensors that are not packed; unless the model is `complete`, tensors of the artifact may be missing."""
    tied = set(model.all_tied_weights_keys) | set(model.all_tied_weights_keys.values())
    for name, tensor in model.state_dict().items():
        if name in packed:
            continue
        file_tensor = _find(stored, name, model.base_model_prefix)
        if file_tensor is None and complete and name not in tied:
            raise UserError(f"tensor {name!r} is missing from the weights; copy or compile the artifact again")
        if file_tensor is None:
            continue
        if file_tensor.shape != tuple(tensor.shape) or not file_tensor.dtype.startswith(("F", "BF")):
            found = f"{file_tensor.dtype} {list(file_tensor.shape)}"
            raise UserError(f"{file_tensor.path}: tensor {name!r} is {found}, expected floats {list(tensor.shape)}")


def _find(stored: Mapping[str, StoredTensor], name: str, prefix: str) -> StoredTensor | None:
    for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        if candidate in stored:
            return stored[candidate]
    return None


def register() -> None:
    """Register the quantisation method with transformers. A second call has no effect."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(ReallmConfig)
        register_quantizer(METHOD)(ReallmQuantizer)
