"""Running a model in another dtype than its own, as a whole or block by block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from reallm.system.scratch import Scratch


def tensors_of(module: nn.Module) -> list[Tensor]:
    """The parameters and buffers of `module`."""
    return [*module.parameters(), *module.buffers()]


def tensors_outside(model: nn.Module, blocks: Iterable[str]) -> list[Tensor]:
    """The parameters and buffers of `model` that none of `blocks`, given by path, has."""
    inside = {id(tensor) for path in blocks for tensor in tensors_of(model.get_submodule(path))}
    return [tensor for tensor in tensors_of(model) if id(tensor) not in inside]


@contextmanager
def computing_in(tensors: Iterable[Tensor], dtype: torch.dtype, scratch: Scratch | None = None) -> Iterator[None]:
    """Convert floating-point `tensors` to `dtype` within the context; float32 ones stay as they are.

    With `scratch` the converted values are in files there.
    """
    before = [(t, t.data) for t in tensors if t.is_floating_point() and t.dtype not in (dtype, torch.float32)]
    try:
        for tensor, data in before:
            tensor.data = data.to(dtype) if scratch is None else scratch.copy(data, dtype)
        yield
    finally:
        for tensor, data in before:
            tensor.data = data


def run_block_by_block(model: nn.Module, blocks: Iterable[str], dtype: torch.dtype, scratch: Scratch) -> None:
    """Make `model` compute in `dtype` from now on, with at most one of its `blocks` (paths) converted at a time.

    What is outside the blocks is converted once, into files in `scratch`. Float32 tensors stay as they are.
    """
    blocks = tuple(blocks)
    for tensor in tensors_outside(model, blocks):
        if tensor.is_floating_point() and tensor.dtype not in (dtype, torch.float32):
            tensor.data = scratch.copy(tensor, dtype)
    for path in blocks:
        _convert_while_running(model.get_submodule(path), dtype)


def _convert_while_running(block: nn.Module, dtype: torch.dtype) -> None:
    running: list[ExitStack] = []

    def begin(module: nn.Module, _args: Any) -> None:
        stack = ExitStack()
        stack.enter_context(computing_in(tensors_of(module), dtype))
        running.append(stack)

    def end(_module: nn.Module, _args: Any, _output: Any) -> None:
        running.pop().close()

    block.register_forward_pre_hook(begin)
    block.register_forward_hook(end, always_call=True)
