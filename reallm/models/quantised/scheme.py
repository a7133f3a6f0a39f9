"""What a quantisation scheme stores for one weight, and how the weight is computed from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

Decode = Callable[[Mapping[str, Tensor]], Tensor]
"""Computes a weight in float32 from its stored tensors, given by their roles."""
PACKED = "packed"
"""The role of the tensor that holds the codes."""
# What the input or the cache of a layer is scaled by when it is quantised too; the weights do not depend on it.
ACTIVATION_SCALES = (
    *(".activation_scale", ".input_scale", ".input_zero_point", ".input_global_scale", ".act_scale"),
    *(".k_scale", ".v_scale", ".q_scale", ".k_zero_point", ".v_zero_point", ".output_scale"),
)


@dataclass(frozen=True)
class Scheme:
    """One way of storing a weight as several tensors. Their names differ only in how they end."""

    method: str
    """The scheme's name in messages."""
    packed: str
    """The end of the name of the tensor that holds the codes; "" where it has the weight's own name."""
    dtypes: frozenset[str]
    """The types, in safetensors' names, that mark such a tensor as quantised."""
    decode: Decode
    """Computes the weight from `PACKED` and the roles below. Raises ValueError for shapes that do not fit."""
    needed: Mapping[str, tuple[str, ...]]
    """Role -> ends that replace `packed`, of which the first that exists is read."""
    optional: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The same for tensors that may be absent."""
    weight: str | None = None
    """The end that replaces `packed` in the weight's own name; None where it is the same."""
