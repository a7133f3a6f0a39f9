"""Packed linear modules that multiply the same x (q, k, v; gate, up), computed by one GPU launch.

The first module of a group that is called computes the products of all members and stores the others' with the tensor
x. A member that is then called with that very tensor, unchanged, takes its product from there. Correctness does not
depend on it: a member that finds no stored product multiplies by itself. A leader whose stored products are never taken
(a decoder's q beside the k and v of an encoder's output) stops computing them.
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
"""After this many calls in a row whose stored products nobody took, a group computes none any more."""


class GroupedLinear(Packed, nn.Linear):  # type: ignore[override]  # weight: a property, not a Parameter
    """A packed linear module that may share its input with others."""

    input_group: InputGroup | None = None
    """The modules that multiply the same x, this one among them; they are not children of this module."""
    training_part: TrainingPart | None
    """What is being trained of the matrix, while anything is; attached and removed by `runtime.training`."""

    def start_decoding(self, mode: DecodeMode, dtype: torch.dtype) -> None:
        """As for every module that decodes; nothing is being trained yet."""
        super().start_decoding(mode, dtype)
        self.register_module("training_part", None)

    @property
    def in_training(self) -> bool:
        """Whether factors, magnitudes, scales or a codebook of the matrix are being trained."""
        return self.training_part is not None


@dataclass(frozen=True)
class _StoredProduct:
    """A product computed for a module, and the module's `derived` then, which is another one if fields have changed."""

    derived: Derived | None
    product: Tensor


class InputGroup:
    """The packed linear modules that share one input, by the last parts of their names, in the order of their calls."""

    def __init__(self, modules: Mapping[str, GroupedLinear]) -> None:
        self.modules = dict(modules)
        self.wasted = 0
        """Launches in a row whose stored products nobody has taken."""

    def product(self, linear: GroupedLinear, inputs: Tensor) -> Tensor | None:
        """y [..., rows] of `linear` for x [..., cols], or None if it has to multiply by itself.

        The product was stored with `inputs` by an earlier call, or is computed now with those of the group it leads.
        """
        # A gain is applied before the bias; nothing can be stored with an inference tensor; for many rows, one launch
        # per matrix is as fast.
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
    """Give the modules of a model that share an input, as their names tell, their common InputGroup."""
    for names in input_groups(modules):
        group = InputGroup({name.rpartition(".")[2]: modules[name] for name in names})
        for name in names:
            modules[name].input_group = group
