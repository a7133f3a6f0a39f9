"""What each call of a block depends on, found by following one window's gradients through the model.

The code between the blocks runs as it is, with stored results in place of the blocks. So a call may depend on the
results of any earlier calls, and on tensors made outside the blocks (embeddings, Gemma 4's inputs per layer).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .block_calls import Arguments, argument_leaves, tensors_within


@dataclass(frozen=True)
class Dependencies:
    """What one call, or the tail, depends on."""

    results: tuple[int, ...]
    """The earlier calls whose results reach it."""
    outside: tuple[int, ...] = ()
    """Positions, among the flattened arguments, of the tensors that take part in the gradient; empty if none of them
    depends on anything outside the blocks.
    """
    hidden: int | None = None
    """Position of the argument that is the first tensor of the preceding call, unchanged; None if there is none."""


class Tracer:
    """Finds the dependencies of calls during one forward pass whose calls are replaced by stored results."""

    def __init__(self) -> None:
        self.leaves: list[list[Tensor]] = []
        """[call] -> the floating-point tensors that stand for its results."""
        self.filled: list[Tensor | None] = []
        """[call] -> the first tensor as the model gets it."""
        self.outside: list[Tensor] = []
        """Embeddings and floating-point inputs of the model."""

    def results(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors to return in place of a call's results `tensors`, which remember the call they come from."""
        leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in tensors]
        given = [leaf.clone() if leaf.requires_grad else leaf for leaf in leaves]
        self.leaves.append([leaf for leaf in leaves if leaf.requires_grad])
        self.filled.append(given[0] if given else None)
        return given

    def call(self, arguments: Arguments) -> Dependencies:
        """The dependencies of the next call, whose arguments these are."""
        flat = argument_leaves(arguments)
        differentiable = [i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor) and leaf.requires_grad]
        results, from_outside = self._reached([*tensors_within(list(arguments[0])), *tensors_within(arguments[1])])
        floats = [i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        before = self.filled[-1] if self.filled else None
        hidden = next((i for i in differentiable if flat[i] is before), None)
        if not differentiable:  # nothing before it was followed: take what it gets as made outside the blocks
            return Dependencies(results, tuple(floats), hidden)
        return Dependencies(results, tuple(differentiable) if from_outside else (), hidden)

    def tail(self, output: Any) -> Dependencies:
        """The dependencies of the model's output."""
        return Dependencies(self._reached(list(tensors_within(dict(output))))[0])

    def _reached(self, tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], bool]:
        """(the calls whose results `tensors` depend on, whether they depend on tensors from outside the blocks)."""
        ends = [tensor for tensor in tensors if tensor.requires_grad]
        owners = [call for call, leaves in enumerate(self.leaves) for _ in leaves]
        starts = [leaf for leaves in self.leaves for leaf in leaves] + self.outside
        if not ends or not starts:
            return (), False
        gradients = torch.autograd.grad(
            ends, starts, [torch.ones_like(end) for end in ends], retain_graph=True, allow_unused=True
        )
        reached = [gradient is not None for gradient in gradients]
        calls = {call for call, hit in zip(owners, reached[: len(owners)], strict=True) if hit}
        return tuple(sorted(calls)), any(reached[len(owners) :])

    @contextmanager
    def following_embeddings(self) -> Iterator[None]:
        """Within the context, every look-up in an embedding counts as a tensor made outside the blocks."""
        with _FollowedLookups(self.outside):
            yield


class _FollowedLookups(TorchFunctionMode):
    """Makes the result of every embedding look-up a leaf that requires a gradient, and adds it to `leaves`."""

    def __init__(self, leaves: list[Tensor]) -> None:
        super().__init__()
        self.leaves = leaves

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is not nn.functional.embedding:
            return output
        leaf = output.detach().requires_grad_()
        self.leaves.append(leaf)
        return leaf.clone()  # a model may change it in place, which a leaf does not allow
