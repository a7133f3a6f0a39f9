"""The weight of a packed module as other code sees it: a tensor that can be read but not written.

Writing to it (PEFT's merge, an initialiser, an optimiser) would change a decoded copy, and the next save would lose the
change. So every in-place write raises an error that says what to do instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

REFUSAL = (
    "a reallm weight is decoded from packed codes and cannot be written: the change would be lost on saving; "
    "keep adapters unmerged, use `reallm finetune`, or call model.dequantize() first"
)


class FrozenWeightError(RuntimeError):
    """Raised when code tries to write to a decoded weight in place."""


def _writes(function: Callable[..., object]) -> bool:
    name = getattr(function, "__name__", "")
    if name == "__set__":
        return True
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in ("__invert__", "__index__", "__int__"))
    return name.endswith("_") and not name.endswith("__") and name != "requires_grad_"


class DecodedWeight(Tensor):
    """A read-only view of a decoded weight; every result of an operation on it is a plain tensor."""

    _is_hf_initialized: bool  # transformers' initialisers leave such a tensor alone

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        target = args[0] if args else named.get("tensor")  # torch.nn.init passes the tensor by name
        if (_writes(func) and isinstance(target, DecodedWeight)) or isinstance(named.get("out"), DecodedWeight):
            raise FrozenWeightError(REFUSAL)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **named)
        data = getattr(func, "__self__", None) is Tensor.data and getattr(func, "__name__", "") == "__get__"
        return result.clone() if data else result


def frozen(weight: Tensor) -> Tensor:
    """`weight` (any shape) as a DecodedWeight that shares its memory."""
    result = weight.as_subclass(DecodedWeight)
    result._is_hf_initialized = True
    return result
