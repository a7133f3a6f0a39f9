"""The quantizer for transformers: after `import reallm`, from_pretrained, generate and save_pretrained take artifacts.

transformers builds the model without allocating memory (on "meta"), lets the quantizer replace modules, reads the files
and calls the quantizer again. Before reading, the files' headers are compared with what the modules expect; after
reading, every packed tensor must have come from a file. Otherwise loading fails: a packed weight is never random.

This module is imported with transformers' registry of quantisation methods, before transformers' models. It must
therefore import neither these nor anything that takes long; the methods import what they need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from reallm.artifacts.quantization_config import METHOD, QuantizationRecord, read_quantization
from reallm.artifacts.weights_guard import add_guard, remove_guard
from reallm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    part = False
    """Whether the model's class is another one than that of the artifact."""

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """True: norms, biases and low-rank factors can be trained without adapters (see `runtime.training`)."""
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """The default state dict, and the metadata of the weights files; transformers calls this to save.

        Raises UserError if the files would not hold the whole model.
        """
        from .saving import FileMetadata, check_savable

        check_savable(model, self.quantization_config.record)
        return None, FileMetadata()

    def update_attn_implementation(self, config: Any) -> Any:
        """Remove the guard from the configuration: transformers calls this before it looks for the weights."""
        remove_guard(config)
        return config

    update_tp_plan = update_attn_implementation  # what transformers calls there in its first 5.x releases

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """No conversions, as an artifact's tensors have the names of the modules; only prefixes for a part of it."""
        from .parts import prefix_changes

        return prefix_changes(weight_conversions) if self.part else []

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
        checkpoint_files: Sequence[str] | None = None,
        **unused: object,
    ) -> None:
        from .file_headers import check_headers, keep_stored_dtypes, read_headers, stored_dtype
        from .install import install
        from .model_attributes import answer_from_packed_modules
        from .parts import changes_of, is_part, record_of_part, renamed

        config = self.quantization_config
        dtype = dtype or torch.get_default_dtype()
        files = [Path(file) for file in checkpoint_files or ()]
        self.part = bool(files) and is_part(model, files[0].parent)
        changes = changes_of(model) if self.part else []
        if self.part:
            config.record = record_of_part(config.record, model, changes)
        with torch.device("meta"):
            install(model, config.record, dtype)
        answer_from_packed_modules(model)
        _retie(model, config.record)
        if files:
            folder = files[0].parent
            stored = {renamed(name, changes): tensor for name, tensor in read_headers(files).items()}
            check_headers(model, stored, folder, self.part)
            if dtype == stored_dtype(folder):
                keep_stored_dtypes(model, stored)

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Replace every packed module by a module of its original class; see `runtime.dequantize`."""
        from .dequantize import dequantize

        dequantize(model, self.quantization_config.record, dtype)
        self.remove_quantization_config(model)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **unused: object) -> PreTrainedModel:
        from .install import packed_tensors
        from .step.generate import use_step

        for name, raw in packed_tensors(model).items():
            if not getattr(raw, "_is_hf_initialized", False) or raw.is_meta:
                raise UserError(
                    f"tensor {name!r} was not loaded: its file is incomplete, or `offload_buffers` moved it out of "
                    "memory; copy the artifact again, or load it without `offload_buffers`"
                )
        model._weight_conversions = []  # it is saved under the names of its modules
        if model.can_generate():
            use_step(model)
        return model


def _retie(model: PreTrainedModel, record: QuantizationRecord) -> None:
    """Remove the model's ties of weights that are now packed, and add the record's aliases as ties."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    ties = {**model.all_tied_weights_keys, **record.aliases}
    model.all_tied_weights_keys = {
        target: source for target, source in ties.items() if target in names and source in names
    }


def _guard_saved_configs() -> None:
    """Make transformers write the guard into config.json whenever it saves a configuration of reallm's method."""
    original = PretrainedConfig.to_json_file

    @wraps(original)
    def to_json_file(self: Any, *args: Any, **options: Any) -> None:
        quantization = getattr(self, "quantization_config", None)
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        if method != METHOD and not isinstance(quantization, ReallmConfig):
            original(self, *args, **options)
            return
        add_guard(self)
        try:
            original(self, *args, **options)
        finally:
            remove_guard(self)

    PretrainedConfig.to_json_file = to_json_file


def register() -> None:
    """Register the quantisation method with transformers. A second call has no effect."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(ReallmConfig)
        register_quantizer(METHOD)(ReallmQuantizer)
        _guard_saved_configs()
