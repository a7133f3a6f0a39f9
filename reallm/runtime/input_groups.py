"""Packed linears that multiply the same x (q, k, v; gate, up): on a GPU one launch makes the products of those alike.

The first of them that is called makes all and leaves the others' with the tensor x, where these take them if they are
called with the very same x, unchanged. Nothing depends on it: whoever finds nothing multiplies by itself. A leader
whose products nobody takes (a decoder's q beside an encoder's k and v) stops making them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from reallm.codegen.ir.dataflow import siblings
from reallm.codegen.launch.derived_tensors import Derived, derive
from reallm.codegen.launch.grouped import MAX_ROWS, Member, group_of_leader, multiply_group
from reallm.codegen.launch.launch import StoredMatrix, input_cache

if TYPE_CHECKING:
    from .modules import CompressedLinear
    from .packed import Packed

PATIENCE = 3
"""Calls in a row whose products for others nobody took, after which none are made."""


@dataclass(frozen=True)
class _Left:
    """A product made for a module, and by which of its `derived`: another one says that its fields have changed."""

    derived: Derived | None
    product: Tensor


class InputGroup:
    """The packed linears of one input in the order of their calls, by the last parts of their names."""

    def __init__(self, modules: Mapping[str, CompressedLinear]) -> None:
        self.modules = dict(modules)
        self.wasted = 0

    def product(self, packed: Packed, inputs: Tensor) -> Tensor | None:
        """y [..., rows] of `packed`, left with `inputs` by an earlier call or by one launch for all that it leads; None
        where it is alone."""
        if packed.gain is not None or inputs.is_inference() or inputs.shape[:-1].numel() > MAX_ROWS:
            return None  # its gain comes before its bias; nothing can be left with x; or nothing is saved
        kept = input_cache(inputs)
        left: _Left | None = kept.pop((packed, "product"), None)
        if left is not None and left.derived is packed.derived:
            self.wasted = 0
            return left.product
        led = self._led(packed, inputs) if self.wasted < PATIENCE else ()
        if not led:
            return None
        modules = [self.modules[member.name] for member in led]
        own, *others = multiply_group(led, [stored(m, _bias(m, inputs)) for m in modules], inputs)
        kept.update({(m, "product"): _Left(m.derived, y) for m, y in zip(modules[1:], others, strict=True)})
        self.wasted += 1
        return own

    def _led(self, packed: Packed, inputs: Tensor) -> tuple[Member, ...]:
        """The members of the group that `packed` leads, if all can be multiplied here and now."""
        members = tuple(
            Member(name, module.format, module.rows, module.cols, module.bias is not None)
            for name, module in self.modules.items()
            if module.gain is None
        )
        leader = next((name for name, module in self.modules.items() if module is packed), None)
        led = () if leader is None else group_of_leader(members, leader)
        ready = all(_is_ready(self.modules[member.name], inputs) for member in led)
        return led if ready else ()


def _bias(module: CompressedLinear, inputs: Tensor) -> Tensor | None:
    return None if module.bias is None else module.bias.to(inputs.dtype)


def _is_ready(module: CompressedLinear, inputs: Tensor) -> bool:
    return not module.in_training and all(raw.device == inputs.device for raw in module.fields.values())


def stored(packed: Packed, bias: Tensor | None) -> StoredMatrix:
    """The matrix as kernels take it; what they read in place of some fields is made at the first use and kept."""
    fields = packed.fields
    if packed.format.shared_field and packed.shared_codebooks is not None:
        fields[packed.format.shared_field.name] = packed.shared_codebooks
    if packed.derived is None:
        packed.derived = derive(packed.format, fields, packed.rows, packed.cols)
    return StoredMatrix(packed.format, fields, packed.rows, packed.cols, bias, packed.derived)


def link_input_groups(modules: Mapping[str, CompressedLinear]) -> None:
    """Let the linears of a model that share an input by their names know of each other, without being children."""
    for names in siblings(modules):
        shared = InputGroup({name.rpartition(".")[2]: modules[name] for name in names})
        for name in names:
            modules[name].siblings = shared
