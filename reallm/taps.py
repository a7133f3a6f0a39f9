"""Taps: hooks that turn the inputs and output gradients of matrices into statistics while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .model import LoadedModel, Matrix

ROW_BLOCK = 8192  # rows of a head's Fisher at a time


@dataclass(frozen=True)
class Tap:
    """One matrix and where it is used."""

    matrix: Matrix
    module: nn.Module


class _ExpertMode(TorchFunctionMode):
    """Sees F.linear(x, stack[e]) for the slices of 3-D expert parameters."""

    def __init__(self, stacks: dict[int, dict[int, Matrix]], record: Callable[[Matrix, Tensor, Tensor], None]) -> None:
        super().__init__()
        self.stacks, self.record = stacks, record

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and isinstance(args[1], Tensor) and args[1].dim() == 2:
            weight = args[1]
            slices = self.stacks.get(weight.untyped_storage().data_ptr())
            if slices is not None:
                index = weight.storage_offset() // weight.numel()
                if index in slices:
                    self.record(slices[index], args[0], output)
        return output


class Taps:
    """Accumulates the statistics of some matrices over many forward and backward passes; float32."""

    def __init__(self, loaded: LoadedModel, matrices: list[Matrix], tokens: int) -> None:
        self.tokens = tokens
        self.sums: dict[str, Tensor] = {}
        self._inputs: dict[str, Tensor] = {}
        self._modules = [(m, self._module(loaded, m)) for m in matrices if m.kind != "expert"]
        self._stacks: dict[int, dict[int, Matrix]] = {}
        for m in matrices:
            if m.kind == "expert" and m.expert is not None:
                stack = loaded.model.get_parameter(m.parameter)
                self._stacks.setdefault(stack.untyped_storage().data_ptr(), {})[m.expert] = m
        self._heads = [
            (m, loaded.model.get_submodule(name.rsplit(".", 1)[0]))
            for m in matrices
            if m.kind == "embedding"
            for name in m.tied
        ]

    @staticmethod
    def _module(loaded: LoadedModel, matrix: Matrix) -> nn.Module:
        module: nn.Module = loaded.model.get_submodule(matrix.parameter.rsplit(".", 1)[0])
        return module

    def _add(self, key: str, value: Tensor) -> None:
        if key in self.sums:
            self.sums[key].add_(value)
        else:
            self.sums[key] = value

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Record one forward and backward pass."""
        with ExitStack() as stack:
            for matrix, module in self._modules:
                hook = self._lookup_hook(matrix) if matrix.kind == "embedding" else self._linear_hook(matrix)
                stack.callback(module.register_forward_hook(hook).remove)
            for matrix, module in self._heads:
                stack.callback(module.register_forward_hook(self._linear_hook(matrix)).remove)
            if self._stacks:
                stack.enter_context(_ExpertMode(self._stacks, self._record))
            yield
        self._inputs.clear()

    def _linear_hook(self, matrix: Matrix) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self._record(matrix, args[0], output)

        return hook

    def _lookup_hook(self, matrix: Matrix) -> Callable[..., Tensor | None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            ids = args[0].reshape(-1)
            leaf = output.detach().requires_grad_()

            def receive(gradient: Tensor) -> None:
                squares = gradient.detach().float().reshape(ids.numel(), -1).square_().div_(self.tokens)
                key = f"lookup/{matrix.name}"
                if key not in self.sums:
                    self.sums[key] = torch.zeros(matrix.rows, matrix.cols)
                self.sums[key].index_add_(0, ids, squares)

            torch.Tensor.register_hook(leaf, receive)
            return leaf

        return hook

    def _record(self, matrix: Matrix, value: Tensor, output: Tensor) -> None:
        """Keep the input; when the output's gradient arrives, add what it tells."""
        if not output.requires_grad:
            return
        x = self._inputs.get(matrix.input)
        if x is None:
            x = value.detach().float().reshape(-1, matrix.cols)
            self._inputs[matrix.input] = x
            self._add(f"hessian/{matrix.input}", (x.T @ x).div_(self.tokens))
        half = value.dtype
        inputs = x

        def receive(gradient: Tensor) -> None:
            g2 = gradient.detach().float().reshape(-1, matrix.rows).square_()
            importance = g2.mean(1, keepdim=True)
            self._add(f"guided/{matrix.name}", ((inputs * importance).T @ inputs).div_(self.tokens))
            self._add_fisher(matrix, g2, inputs, half)
            if matrix.kind in ("head", "embedding"):
                self._add(f"row_weight/{matrix.name}", g2.sum(0))

        torch.Tensor.register_hook(output, receive)

    def _add_fisher(self, matrix: Matrix, g2: Tensor, x: Tensor, half: torch.dtype) -> None:
        """Sums of positive products: the model's own dtype is precise enough for each window's share (bf16: 2^-9)."""
        dtype = torch.bfloat16 if half == torch.bfloat16 else torch.float32
        peak = g2.max().clamp_min(1e-30)
        left, right = (g2 / peak).to(dtype), x.square().to(dtype)
        key = f"fisher/{matrix.name}"
        if key not in self.sums:
            self.sums[key] = torch.zeros(matrix.rows, matrix.cols)
        scale = float(peak) / self.tokens
        for start in range(0, matrix.rows, ROW_BLOCK):
            rows = slice(start, start + ROW_BLOCK)
            self.sums[key][rows].add_((left[:, rows].T @ right).float(), alpha=scale)

    def collected(self) -> dict[str, Tensor]:
        """What is stored: Fisher and look-ups in bf16, the rest in float32; row weights with mean one."""
        result = {}
        for key, value in self.sums.items():
            kind = key.split("/", 1)[0]
            if kind == "row_weight":
                mean = value.mean()
                result[key] = value / mean if float(mean) > 0 else torch.ones_like(value)
            else:
                result[key] = value.to(torch.bfloat16) if kind in ("fisher", "lookup") else value
        return result
