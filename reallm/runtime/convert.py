"""Convert a model's own modules to packed modules with the same state, except for the weight, and back."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from functools import cache
from typing import Any

import torch
from torch import nn

from reallm.artifacts.quantization_config import DecodeMode
from reallm.kernels.formats.formats import Format

from .modules import CompressedEmbedding, CompressedLinear, TiedHead
from .packed import Original, Packed, Shared


@cache
def _packed_subclass(original: Any, packed: Any) -> Any:
    return type(f"Compressed{original.__name__}", (original, packed), {})


def _converted(module: nn.Module, packed: Any, plain: type[nn.Module]) -> Any:
    """A module of the class `packed` with the state of `module` (bias, buffers, hooks, attributes) but no weight.

    If the class of `module` is a subclass of torch's `plain`, the result's class derives from it too, because the model
    may rely on it: Gemma's embedding scales its rows in its own `forward`, and code may check isinstance.
    The subclass is not constructed again, since its arguments are unknown; its state is copied, as copy.copy does.
    """
    original: Any = type(module)
    kind = packed if original is plain else _packed_subclass(original, packed)
    result = kind.__new__(kind)
    vars(result).update(_state(module, vars(module)))
    del result._parameters["weight"]
    result.original = Original(original, frozenset(vars(module)), frozenset(module._buffers))
    return result


def _state(module: nn.Module, names: Iterable[str]) -> dict[str, Any]:
    """The attributes `names` of `module`; those that hold its parameters, buffers, children and hooks are copied."""
    values = {name: vars(module)[name] for name in names}
    return {name: copy(value) if isinstance(value, dict | set) else value for name, value in values.items()}


def to_dense(module: Packed | TiedHead, weight: nn.Parameter) -> nn.Module:
    """A module of the class that `module` replaced, with its state and `weight`, which has the shape of that class."""
    from transformers.pytorch_utils import Conv1D  # packing does not need transformers

    kind, attributes, buffers = module.original
    result: nn.Module
    if kind is Conv1D:
        with torch.device("meta"):
            result = Conv1D(*reversed(weight.shape))
        result.train(module.training)
        result.weight, result.bias = weight, module.bias
        return result
    result = kind.__new__(kind)
    vars(result).update(_state(module, attributes))
    result._buffers = {name: raw for name, raw in module._buffers.items() if name in buffers}
    result._parameters = {"weight": weight, **module._parameters}
    result._modules.pop("training_part", None)
    return result


def pack_linear(
    module: nn.Linear, fmt: Format, mode: DecodeMode, dtype: torch.dtype, shared: Shared
) -> CompressedLinear:
    """A CompressedLinear that replaces `module`; its fields are uninitialised, and it computes in `dtype`."""
    result = _converted(module, CompressedLinear, nn.Linear)
    assert isinstance(result, CompressedLinear)
    result.allocate_fields(fmt, module.out_features, module.in_features, mode=mode, dtype=dtype, shared=shared)
    return result


def pack_embedding(
    module: nn.Embedding, fmt: Format, mode: DecodeMode, dtype: torch.dtype, shared: Shared
) -> CompressedEmbedding:
    """A CompressedEmbedding that replaces `module`; its fields are uninitialised, and it returns rows in `dtype`."""
    result = _converted(module, CompressedEmbedding, nn.Embedding)
    assert isinstance(result, CompressedEmbedding)
    result.allocate_fields(fmt, module.num_embeddings, module.embedding_dim, mode=mode, dtype=dtype, shared=shared)
    return result


def tie_head(head: nn.Linear, source: CompressedEmbedding) -> TiedHead:
    """A TiedHead that replaces `head` and uses the weight of `source`."""
    result = _converted(head, TiedHead, nn.Linear)
    assert isinstance(result, TiedHead)
    result._source = (source,)
    result._is_hf_initialized = True
    return result
