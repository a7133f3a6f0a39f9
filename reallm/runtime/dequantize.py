"""Turn a packed model back into a dense one: `model.dequantize()` of transformers.

The result is an ordinary model: its modules have their original classes and hold the decoded weights, its tied weights
are tied again, and what `save_pretrained` then writes loads without reallm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from reallm.artifacts.quantization_config import QuantizationRecord
from reallm.errors import UserError

from .convert import to_dense
from .experts import ExpertStack, PackedExpert
from .input_groups import GroupedLinear
from .modules import TiedHead
from .packed import Packed, SharedCodebooks


@torch.no_grad()
def dequantize(model: PreTrainedModel, record: QuantizationRecord, dtype: torch.dtype | None = None) -> None:
    """Replace every packed module of `model` by a dense one with the decoded weight.

    By default a weight gets the dtype in which its module computes, and other tensors keep theirs; with `dtype` all get
    that one. Memory grows module by module, up to that of the uncompressed model. Attached adapters are merged into the
    weights. Raises UserError while matrices are being trained, for a model that is spread
    over several devices, and for PEFT's adapters of GPT-2's kind of model.
    """
    _check(model)
    weights: dict[nn.Module, nn.Parameter] = {}
    heads: list[tuple[nn.Module, str, TiedHead]] = []
    for parent, name, module in _children(model):
        if isinstance(module, ExpertStack):
            del parent._modules[name]
            parent.register_parameter(name, _parameter(module.decode_now(module.decoded.dtype)))
        elif isinstance(module, TiedHead):
            heads.append((parent, name, module))
        elif isinstance(module, Packed) and not isinstance(module, PackedExpert):
            if module not in weights:
                weights[module] = _dense_weight(module)
            setattr(parent, name, to_dense(module, weights[module]))
    for parent, name, head in heads:
        setattr(parent, name, to_dense(head, weights[head.source]))
    model._modules.pop(SharedCodebooks.NAME, None)
    _restore_attributes(model, bool(record.tied))
    if dtype is not None:
        model.to(dtype)


def _check(model: PreTrainedModel) -> None:
    if any(isinstance(module, GroupedLinear) and module.in_training for module in model.modules()):
        raise UserError("a model whose packed matrices are being trained cannot be dequantized; finish the training")
    for name, module in model.named_modules():
        if isinstance(module, GroupedLinear) and module.original.kind is Conv1D and name.endswith(".base_layer"):
            raise UserError(
                f"PEFT's adapter of {name} takes it for a Linear, not a Conv1D; unload it before dequantize()"
            )
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise UserError("a model that `device_map` spread over devices cannot be dequantized; load it on one device")


def _children(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, module) of every child in `model`; a module with several parents is listed for each."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None
    ]


def _dense_weight(module: Packed) -> nn.Parameter:
    weight = module.decode_now(module.decoded.dtype)
    return _parameter(weight.T if module.original.kind is Conv1D else weight)


def _parameter(weight: Tensor) -> nn.Parameter:
    with torch.inference_mode(False):
        return nn.Parameter(weight.clone(memory_format=torch.contiguous_format))


def _restore_attributes(model: PreTrainedModel, tied: bool) -> None:
    """Undo what compiling changed in the configuration, and what loading changed in the model."""
    if tied:
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = True
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    for name in ("generate", "_weight_conversions"):  # the decode step; that no tensor was renamed while loading
        vars(model).pop(name, None)
