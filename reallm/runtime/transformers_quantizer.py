"""The tie to transformers: `import reallm`, then from_pretrained, generate and save_pretrained on an artifact.

transformers builds the model without memory ("meta"), lets the quantizer replace modules, reads the files, and lets it
look again. Before the reading, the files' headers are held against what the modules expect; after it, every packed
tensor must have come from a file. Otherwise loading fails: a compiled weight is never random.
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
from reallm.kernels.storage.safetensors import StoredTensor, read_header

from .install import install, packed_tensors


class ReallmConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is untyped here
    """`quantization_config` of config.json, checked when it is made."""

    def __init__(self, record: QuantizationRecord) -> None:
        self.quant_method = METHOD
        self.record = record

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, object], return_unused_kwargs: bool = False, **unused: object) -> Any:
        """Check and wrap the dictionary. Raises UserError."""
        config = cls(read_quantization(config_dict))
        return (config, unused) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The dictionary that config.json holds."""
        return self.record.model_dump(mode="json")


class ReallmQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is untyped here
    """Replaces the modules an artifact packs, and sees that all of their fields arrive."""

    requires_calibration = True
    quantization_config: ReallmConfig

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """True: norms, biases and low-rank factors train without adapters (see `LowRankTraining`)."""
        return True

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """None: an artifact's tensors carry the names of the modules that hold them."""
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
                raise UserError(f"tensor {name!r} was not loaded: its file is incomplete, or it was sent to disk")
        if model.can_generate():
            from .step.generate import use_step  # which imports transformers, and this file is loaded amid that

            use_step(model)
        return model


def _retie(model: PreTrainedModel, record: QuantizationRecord) -> None:
    """Forget ties whose weights are packed now; keep those of the record's aliases."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    ties = {**model.all_tied_weights_keys, **record.aliases}
    model.all_tied_weights_keys = {
        target: source for target, source in ties.items() if target in names and source in names
    }


def read_headers(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """The tensors of all weights files. Raises UserError for a damaged header or a name in two files."""
    stored: dict[str, StoredTensor] = {}
    for file in files:
        try:
            header = read_header(file)
        except LayoutError as error:
            raise UserError(str(error)) from None
        if twice := stored.keys() & header.keys():
            raise UserError(f"{file}: tensor {min(twice)!r} stands in another file too")
        stored |= header
    return stored


def check_headers(model: PreTrainedModel, files: Sequence[Path]) -> None:
    """Hold the files' headers against the model, before a byte of data is read or allocated.

    Every field must be there as U8 of its exact size, every other tensor in its shape. Raises UserError.
    """
    stored = read_headers(files)
    expected = packed_tensors(model)
    for name, raw in expected.items():
        found = _find(stored, name, model.base_model_prefix)
        if found is None:
            raise UserError(f"{files[0]}: tensor {name!r} is missing; copy or compile the artifact again")
        if found.dtype != "U8" or found.shape != tuple(raw.shape):
            raise UserError(
                f"{found.path}: tensor {name!r} is {found.dtype} {list(found.shape)}, expected U8 {list(raw.shape)}"
            )
    whole = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
    _check_others(model, stored, set(expected), whole)


def _check_others(model: PreTrainedModel, stored: Mapping[str, StoredTensor], packed: set[str], whole: bool) -> None:
    tied = set(model.all_tied_weights_keys) | set(model.all_tied_weights_keys.values())
    for name, tensor in model.state_dict().items():
        if name in packed:
            continue
        found = _find(stored, name, model.base_model_prefix)
        if found is None and whole and name not in tied:
            raise UserError(f"tensor {name!r} is missing from the weights; copy or compile the artifact again")
        if found is not None and (found.shape != tuple(tensor.shape) or not found.dtype.startswith(("F", "BF"))):
            raise UserError(
                f"{found.path}: tensor {name!r} is {found.dtype} {list(found.shape)}, expected {list(tensor.shape)}"
            )


def _find(stored: Mapping[str, StoredTensor], name: str, prefix: str) -> StoredTensor | None:
    for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        if candidate in stored:
            return stored[candidate]
    return None


def register() -> None:
    """Make transformers know the method; a second call changes nothing."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(ReallmConfig)
        register_quantizer(METHOD)(ReallmQuantizer)
