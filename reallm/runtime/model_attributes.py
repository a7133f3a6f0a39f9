"""`dtype` and `device` of a model with packed weights.

transformers takes both from the first parameter of a model. A packed model may have no parameter (OLMo's norms have no
weights, so there generating and saving would fail), or its first one may be among those that stay in float32, or it may
be on the disk. So a model with packed modules answers from these: with the dtype in which they compute, and with the
device of their fields.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .packed import Packed

_FLAG = "_has_packed_weights"


def answer_from_packed_modules(model: PreTrainedModel) -> None:
    """Let `dtype` and `device` of `model`, and of every transformers model in it, come from its packed modules."""
    if not hasattr(PreTrainedModel, _FLAG):
        setattr(PreTrainedModel, _FLAG, False)
        PreTrainedModel.dtype = _property("dtype", _compute_dtype)
        PreTrainedModel.device = _property("device", _device)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            setattr(module, _FLAG, True)


def _property(name: str, answer: Callable[[nn.Module], Any]) -> property:
    """transformers' property, which `answer` replaces where a model is flagged and has packed modules."""
    original = getattr(PreTrainedModel, name)

    def get(self: PreTrainedModel) -> Any:
        result = answer(self) if getattr(self, _FLAG) else None
        return original.fget(self) if result is None else result

    return property(get, doc=original.__doc__)


def _compute_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype in which the first packed module of `model` computes; None if it has none."""
    return next((module.decoded.dtype for module in model.modules() if isinstance(module, Packed)), None)


def _device(model: nn.Module) -> torch.device | None:
    """The device of the first packed module of `model` that is in memory; None if there is none."""
    devices = (raw.device for m in model.modules() if isinstance(m, Packed) for raw in m.fields.values())
    return next((device for device in devices if device.type != "meta"), None)
