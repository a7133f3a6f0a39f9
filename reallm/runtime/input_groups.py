"""Packed linear modules that multiply the same x (q, k, v; gate, up), computed by one GPU launch.

The leader, the first module of a group to be called, computes the products of all members and stores those of the other
members with the tensor x. A member that is then called with the same unchanged tensor object takes its product from
there; a member that finds no stored product computes its own. A leader whose stored products are never taken (as in
cross-attention, where q has another input than k and v) stops computing them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reallm.artifacts.quantization_config import DecodeMode
from reallm.codegen.ir.dataflow import input_groups
from reallm.codegen.launch.bindings import StoredMatrix, input_cache
from reallm.codegen.launch.derived_tensors import Derived, derive
from reallm.codegen.launch.grouped import MAX_ROWS, Member, group_of_leader, multiply_group

from .packed import Packed
from .training.part import TrainingPart

PATIENCE = 3
"""A group stops storing products after this many launches in a row whose stored products no member took."""


class GroupedLinear(Packed, nn.Linear):  # type: ignore[override]  # weight: a property, not a Parameter
    """A packed linear module that may share its input with others."""

    input_group: InputGroup | None = None
    """The modules that multiply the same x, including this one; they are not children of this module."""
    training_part: TrainingPart | None
    """The parameters of the matrix that are being trained; None if there are none. Set by `runtime.training`."""

    def start_decoding(self, mode: DecodeMode, dtype: torch.dtype) -> None:
        """Set the mode and the compute dtype; nothing is being trained yet."""
        super().start_decoding(mode, dtype)
        self.register_module("training_part", None)

    @property
    def in_training(self) -> bool:
        """Whether factors, magnitudes, scales or a codebook of the matrix are being trained."""
        return self.training_part is not None


@dataclass(frozen=True)
class _StoredProduct:
    """A product stored for a module, and the module's `derived` at that time, which is replaced when fields change."""

    derived: Derived | None
    product: Tensor


class InputGroup:
    """The packed linear modules that share one input: last part of the name -> module, in the order they are called."""

    def __init__(self, modules: Mapping[str, GroupedLinear]) -> None:
        self.modules = dict(modules)
        self.wasted = 0
        """Number of launches in a row whose stored products no member has taken."""

    def product(self, linear: GroupedLinear, inputs: Tensor) -> Tensor | None:
        """y [..., rows] of `linear` for x [..., cols]; None if `linear` must compute the product alone.

        The product was stored with `inputs` by an earlier call, or is computed now, together with those of the other
        members if `linear` leads a group.
        """
        # No group launch with a gain, which must be applied before the bias, for an inference tensor, which cannot hold
        # stored products, or for many rows, for which one launch per matrix is as fast.
        if linear.gain is not None or inputs.is_inference() or inputs.shape[:-1].numel() > MAX_ROWS:
            return None
        cache = input_cache(inputs)
        stored: _StoredProduct | None = cache.pop((linear, "product"), None)
        if stored is not None and stored.derived is linear.derived:
            self.wasted = 0
            return stored.product
        members = self._members_led_by(linear, inputs) if self.wasted < PATIENCE else ()
        if not members:
            return None
        modules = [self.modules[member.name] for member in members]
        product, *others = multiply_group(members, [stored_matrix(m, _bias(m, inputs)) for m in modules], inputs)
        cache.update({(m, "product"): _StoredProduct(m.derived, y) for m, y in zip(modules[1:], others, strict=True)})
        self.wasted += 1
        return product

    def _members_led_by(self, linear: GroupedLinear, inputs: Tensor) -> tuple[Member, ...]:
        """The members of the group that `linear` leads; empty unless all of them can be multiplied by `inputs` now."""
        candidates = tuple(
            Member(name, module.format, module.rows, module.cols, module.bias is not None)
            for name, module in self.modules.items()
            if module.gain is None
        )
        leader = next((name for name, module in self.modules.items() if module is linear), None)
        members = () if leader is None else group_of_leader(candidates, leader)
        ready = all(_is_ready(self.modules[member.name], inputs) for member in members)
        return members if ready else ()


def _bias(module: GroupedLinear, inputs: Tensor) -> Tensor | None:
    return None if module.bias is None else module.bias.to(inputs.dtype)


def _is_ready(module: GroupedLinear, inputs: Tensor) -> bool:
    return not module.in_training and all(raw.device == inputs.device for raw in module.fields.values())


def stored_matrix(packed: Packed, bias: Tensor | None) -> StoredMatrix:
    """The matrix as generated kernels take it; the tensors derived from its fields are computed once and kept."""
    fields = packed.fields
    if packed.format.shared_field and packed.shared_codebooks is not None:
        fields[packed.format.shared_field.name] = packed.shared_codebooks
    if packed.derived is None:
        packed.derived = derive(packed.format, fields, packed.rows, packed.cols)
    return StoredMatrix(packed.format, fields, packed.rows, packed.cols, bias, packed.derived)


def link_input_groups(modules: Mapping[str, GroupedLinear]) -> None:
    """Give modules that share an input, as their names imply, a common InputGroup; `modules` maps names to modules."""
    for names in input_groups(modules):
        group = InputGroup({name.rpartition(".")[2]: modules[name] for name in names})
        for name in names:
            modules[name].input_group = group
