"""Calls of a model's blocks: intercept them, and take apart what goes into a block and what comes out of it.

A block's results are the tensors it returns and those it writes into a dictionary or a list among its arguments (Gemma
4's layers share keys and values in this way). A `CallTemplate` describes where these tensors belong, so that a stored
result can take the place of the call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch.utils._pytree as pytree  # public in no release yet; transformers registers its own outputs here
from torch import Tensor, nn

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and the keyword arguments of a call."""
Handler = Callable[[int, str, Callable[..., Any], Arguments], Any]
"""Takes the number of a call, the path of its block, the block's own forward method and the arguments; its result
replaces that of the block.
"""


class StopForwardError(Exception):
    """Raised in a handler to end the model's forward pass."""


@contextmanager
def intercepted(blocks: Mapping[str, nn.Module], handle: Handler) -> Iterator[None]:
    """Within the context, calls of `blocks` (path -> module) go to `handle`, numbered in the order in which they come.

    A block that is called while another one runs belongs to that one and is not intercepted.
    """
    numbers, inside = count(), False

    def replacement(path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:
                return forward(*args, **kwargs)
            inside = True
            try:
                return handle(next(numbers), path, forward, (args, kwargs))
            finally:
                inside = False

        return call

    overrides = {path: vars(block).get("forward") for path, block in blocks.items()}
    try:
        for path, block in blocks.items():
            block.forward = replacement(path, block.forward)
        yield
    finally:
        for path, block in blocks.items():
            override = overrides[path]
            if override is None:
                vars(block).pop("forward", None)
            else:
                block.forward = override


class _Slot:
    """Stands for a tensor in the leaves of a CallTemplate."""


SLOT = _Slot()
_Write = tuple[int | str, Any]
"""The container argument (position or keyword), and the key or index in it."""


@dataclass(frozen=True)
class CallTemplate:
    """The results of one call without their tensors."""

    path: str
    """Module path of the block."""
    leaves: tuple[Any, ...]
    """What the block returns and writes, flattened, with SLOT in place of every tensor."""
    spec: Any
    writes: tuple[_Write, ...]

    def fill(self, tensors: Sequence[Tensor], arguments: Arguments) -> Any:
        """The block's result with `tensors` in it; what the block writes into its `arguments` is written there."""
        rest = iter(tensors)
        leaves = [next(rest) if leaf is SLOT else leaf for leaf in self.leaves]
        result, written = pytree.tree_unflatten(leaves, self.spec)
        for (name, key), value in zip(self.writes, written, strict=True):
            container = _argument(arguments, name)
            if isinstance(container, MutableSequence) and key == len(container):
                container.append(value)
            else:
                container[key] = value
        return result


def run_and_take_apart(
    path: str, forward: Callable[..., Any], arguments: Arguments
) -> tuple[Any, CallTemplate, list[Tensor]]:
    """Call `forward`; returns (its result, the template, the tensors that it returned and wrote, in slot order)."""
    before = {name: _entries(container) for name, container in _containers(arguments)}
    result = forward(*arguments[0], **arguments[1])
    writes: list[_Write] = []
    written: list[Any] = []
    for name, container in _containers(arguments):
        known = before[name]
        for key, value in _entries(container).items():
            if key not in known or known[key] is not value:
                writes.append((name, key))
                written.append(value)
    leaves, spec = pytree.tree_flatten((result, written))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    emptied = tuple(SLOT if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    return result, CallTemplate(path, emptied, spec, tuple(writes)), tensors


def with_replaced_tensors(arguments: Arguments, replacements: Mapping[int, Tensor]) -> Arguments:
    """The `arguments` with other tensors at some positions of their flattened leaves."""
    leaves, spec = pytree.tree_flatten(arguments)
    for index, tensor in replacements.items():
        leaves[index] = tensor
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return args, kwargs


def argument_leaves(arguments: Arguments) -> list[Any]:
    """The flattened leaves of `arguments`; a container that is not a plain dictionary, list or tuple is one leaf."""
    return pytree.tree_leaves(arguments)


def tensors_within(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_within(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_within(item)


def _containers(arguments: Arguments) -> Iterator[tuple[int | str, Any]]:
    """The arguments that a block can write into: (position or keyword, container)."""
    named: list[tuple[int | str, Any]] = [*enumerate(arguments[0]), *arguments[1].items()]
    for name, value in named:
        if isinstance(value, MutableMapping | MutableSequence):
            yield name, value


def _entries(container: Any) -> dict[Any, Any]:
    return dict(container) if isinstance(container, Mapping) else dict(enumerate(container))


def _argument(arguments: Arguments, name: int | str) -> Any:
    return arguments[0][name] if isinstance(name, int) else arguments[1][name]
