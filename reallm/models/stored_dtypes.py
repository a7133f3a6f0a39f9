"""Tensors that a file stores in float32 although most of the model is in 16 bits: kept so where the model can run so.

transformers converts every tensor to one dtype while loading, except those that a model's class protects. Released
16-bit models often store decay rates (A_log), routers, indexers or attention sinks in float32, because rounding them
changes the model. They are read again here. Norms and layers that hand float32 to the next layer cannot be float32 in a
16-bit model; these stay rounded, and a note says so.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from reallm.kernels.storage.safetensors_reader import StoredTensor

from .probe import probe_ids

_FAILURES = (RuntimeError, ValueError, TypeError)


@dataclass(frozen=True)
class _Narrowed:
    """A tensor that was converted while loading."""

    name: str
    tensor: Tensor
    rounded: Tensor
    exact: Tensor


def restore_stored_dtypes(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> tuple[str, ...]:
    """Give tensors of a 16-bit `model` that the file stores in float32 their stored values; returns notes.

    Tensors of the same role (the last two parts of the name) are restored together, if the model still runs then.
    """
    roles: dict[str, list[_Narrowed]] = defaultdict(list)
    tensors = {name: (tensor, _find(stored, name, model.base_model_prefix)) for name, tensor in narrowed(model)}
    unnamed = {name for name, entry in stored.items() if entry.dtype == "F32"} - {name for _, name in tensors.values()}
    for name, (tensor, stored_name) in tensors.items():
        value = _read(stored, stored_name, tensor) if stored_name else _find_by_value(stored, unnamed, tensor)
        if value is not None:
            roles[".".join(name.split(".")[-2:])].append(_Narrowed(name, tensor, tensor.data, value))
    rounded: list[str] = []
    for role in roles.values():
        if all(torch.equal(item.rounded.float(), item.exact) for item in role):
            continue
        for item in role:
            item.tensor.data = item.exact
        if not _runs(model):
            for item in role:
                item.tensor.data = item.rounded
            rounded += [item.name for item in role]
    if not rounded:
        return ()
    what = f"{len(rounded)} tensors stored in float32, such as {rounded[0]}, are rounded to {model.dtype}"
    return (f"{what} as transformers does: the model does not run with them in float32",)


def narrowed(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The 16-bit tensors of `model` that are not weights of embeddings or stacks of experts."""
    embeddings = (module for module in model.modules() if isinstance(module, nn.Embedding))
    weights = {id(layer._parameters.get("weight")) for layer in embeddings}  # a packed one has none
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.dtype in (torch.bfloat16, torch.float16) and id(tensor) not in weights and tensor.ndim != 3:
            yield name, tensor


def _find(stored: Mapping[str, StoredTensor], name: str, prefix: str) -> str:
    """The name under which a file stores the model's tensor `name`; empty if it does not."""
    names = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    return next((candidate for candidate in names if candidate in stored), "")


def _read(stored: Mapping[str, StoredTensor], name: str, tensor: Tensor) -> Tensor | None:
    """The float32 values stored under `name`, in the shape of `tensor`; None for another dtype or size."""
    entry = stored[name]
    if entry.dtype != "F32" or math.prod(entry.shape) != tensor.numel():
        return None
    with safe_open(entry.path, framework="pt") as file:
        values: Tensor = file.get_tensor(name)
    return values.reshape(tensor.shape)


def _find_by_value(stored: Mapping[str, StoredTensor], names: set[str], tensor: Tensor) -> Tensor | None:
    """The values of the first tensor among `names` that rounds to `tensor`, removed from `names`; None without one.

    transformers renames tensors of some models while loading, so that the file's name for them is not known here.
    """
    for name in sorted(names):
        values = _read(stored, name, tensor)
        if values is not None and torch.equal(values.to(tensor.dtype), tensor.detach().cpu()):
            names.remove(name)
            return values
    return None


def _runs(model: PreTrainedModel) -> bool:
    try:
        with torch.no_grad():
            model(input_ids=probe_ids(model))
    except _FAILURES:
        return False
    return True
