"""Unpacking quantised weights to plain floats, and refusing those whose scheme is not known."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from reallm.errors import UserError
from reallm.kernels.storage.safetensors_reader import StoredTensor
from reallm.system.scratch import Scratch

from .fp8 import FLOAT8
from .scheme import ACTIVATION_SCALES, PACKED, Scheme

_ONLY_QUANTISED = FLOAT8 | {"F8_E8M0", "F4"}
_INTEGERS = frozenset({"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"})
_COMPANION = re.compile(
    r"[._](weight_scale(_inv|_2)?|weight_zero_point|weight_global_scale|weight_packed|weight_g_idx|weight_format)$"
    r"|\.(qweight|qzeros|qscale_weight|scales|g_idx|SCB)$|_scale_inv$|_(blocks|scales)$"
    r"|\.weight\.(nested_)?(absmax|quant_map)$|\.weight\.quant_state\."
)
"""Names of tensors that only quantised weights have."""


def refuse_quantised(tensors: Mapping[str, StoredTensor], label: str) -> None:
    """Raise UserError, naming the first, if one of `tensors` is a quantised weight or belongs to one.

    Meant for tensors that no known scheme describes: their codes would be taken for values.
    """
    for name, tensor in tensors.items():
        codes = tensor.dtype in _INTEGERS and len(tensor.shape) > 1 and name.endswith("weight")
        if tensor.dtype in _ONLY_QUANTISED or codes:
            what = f"{name} is stored as {tensor.dtype}"
        elif _COMPANION.search(name):
            what = f"the stored tensor {name} is part of a quantised weight"
        else:
            continue
        raise UserError(
            f"{label}: {what}, but config.json does not say how to compute the weight from it; "
            "give the original, unquantised model"
        )


class UnpackedWeights:
    """The weights of a checkpoint by their plain names, with the quantised ones unpacked."""

    def __init__(self, tensors: Mapping[str, StoredTensor], schemes: Sequence[Scheme], label: str) -> None:
        """Match `tensors` to `schemes`. Raises UserError if a part of a quantised weight is missing or left over."""
        self._tensors, self._label = tensors, label
        self.packed: dict[str, tuple[Scheme, dict[str, str]]] = {}
        """Weight -> its scheme and, by role, the names of its stored tensors."""
        for name, tensor in tensors.items():
            for scheme in schemes:
                if name.endswith(scheme.packed) and tensor.dtype in scheme.dtypes and self._match(name, scheme):
                    break
        used = {name for _, parts in self.packed.values() for name in parts.values()}
        rest = {name: tensor for name, tensor in tensors.items() if name not in used}
        self.dropped = tuple(name for name in rest if name.endswith(ACTIVATION_SCALES))
        """Scales of activations, which the weights do not depend on."""
        self.plain = tuple(name for name in rest if name not in self.dropped)
        """The other tensors, which are not quantised."""
        refuse_quantised({name: rest[name] for name in self.plain}, label)

    def _match(self, name: str, scheme: Scheme) -> bool:
        """Add the weight that `name` holds the codes of; False if its companions are those of another scheme."""
        stem = name.removesuffix(scheme.packed)
        parts = {PACKED: name}
        for role, ends in (*scheme.needed.items(), *scheme.optional.items()):
            found = [stem + end for end in ends if stem + end in self._tensors]
            if found:
                parts[role] = found[0]
            elif role in scheme.needed:
                return False
        self.packed[name if scheme.weight is None else stem + scheme.weight] = (scheme, parts)
        return True

    def read(self, dtype: torch.dtype, scratch: Scratch | None = None) -> dict[str, Tensor]:
        """Every weight; unpacked ones are rounded once, from float32 to `dtype`, and others keep their own type.

        With `scratch`, the unpacked weights are in files there. Raises UserError for stored tensors whose shapes do not
        fit each other.
        """
        with _Files(self._tensors) as files:
            result = {name: files.tensor(name) for name in self.plain}
            for weight, (scheme, parts) in self.packed.items():
                try:
                    value = scheme.decode({role: files.tensor(name) for role, name in parts.items()})
                except (ValueError, RuntimeError, LookupError, TypeError) as error:
                    reason = str(error).partition("\n")[0]
                    what = f"{weight} cannot be unpacked by {scheme.method}: {reason}"
                    raise UserError(f"{self._label}: {what}; give the original, unquantised model") from error
                result[weight] = value.to(dtype) if scratch is None else scratch.copy(value, dtype)
        return result


class _Files(ExitStack):
    """The weights files, open for reading one tensor after another."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        super().__init__()
        self._tensors = tensors
        self._open: dict[Path, Any] = {}

    def tensor(self, name: str) -> Tensor:
        """Read one tensor."""
        path = self._tensors[name].path
        if path not in self._open:
            self._open[path] = self.enter_context(safe_open(path, framework="pt"))
        result: Tensor = self._open[path].get_tensor(name)
        return result


def unpacked_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype that quantised weights are unpacked to: that of config.json if it is a float of 16 or 32 bits, else
    bfloat16."""
    for value in _dtypes(config):
        if value in ("float16", "bfloat16", "float32"):
            dtype: torch.dtype = getattr(torch, value)
            return dtype
    return torch.bfloat16


def _dtypes(config: Mapping[str, Any]) -> Iterator[object]:
    yield from (config.get("dtype"), config.get("torch_dtype"))
    text = config.get("text_config")
    if isinstance(text, Mapping):
        yield from (text.get("dtype"), text.get("torch_dtype"))
