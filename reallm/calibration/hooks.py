"""StatisticsHooks: hooks that turn the inputs and output gradients of matrices into statistics while a model runs.

Modules are watched by forward hooks. Look-ups and the slices of 3-D expert stacks are watched as function calls, so
that what a module does besides (Gemma scales its look-ups) is no part of the matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from reallm.models.loaded import LoadedModel, Matrix

ROW_BLOCK = 8192  # rows of a head's Fisher at a time
PANELS = 4  # of a symmetric sum, each up to the diagonal: 5/8 of the products
_PRODUCTS = frozenset({nn.functional.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__})


def _on_gradient(output: Tensor, receive: Callable[[Tensor], None]) -> None:
    output.register_hook(receive)  # type: ignore[no-untyped-call]  # torch leaves it unannotated


def add_moment(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """Add scale left^T right, both [tokens, n], to the lower triangle of `total` [n, n]; above, only some is added."""
    width = -(-len(total) // PANELS)
    for start in range(0, len(total), width):
        stop = start + width
        total[start:stop, :stop].addmm_(left[:, start:stop].T, right[:, :stop], alpha=scale)


class _Calls(TorchFunctionMode):
    """Sees look-ups in embeddings, and products with slices of expert stacks."""

    def __init__(self, taps: StatisticsHooks) -> None:
        super().__init__()
        self.taps = taps

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is nn.functional.embedding:
            return self.taps.look_up(args[0], args[1], output)
        if func in _PRODUCTS and len(args) > 1 and isinstance(args[1], Tensor) and args[1].dim() == 2:
            self.taps.multiply(args[0], args[1], output)
        return output


class StatisticsHooks:
    """Accumulates the statistics of some matrices over many forward and backward passes; float32."""

    def __init__(self, loaded: LoadedModel, matrices: list[Matrix], tokens: int) -> None:
        self.tokens = tokens
        self.sums: dict[str, Tensor] = {}
        self._inputs: dict[str, tuple[Tensor, Tensor]] = {}
        self._modules: list[tuple[Matrix, nn.Module]] = []
        self._embeddings: list[tuple[Matrix, Tensor]] = []
        self._experts: dict[int, Matrix] = {}
        for m in matrices:
            parameter = loaded.model.get_parameter(m.parameter)
            if m.kind == "expert":
                self._experts[parameter[m.expert or 0].data_ptr()] = m
                continue
            if m.kind == "embedding":
                self._embeddings.append((m, parameter))
            users = m.tied if m.kind == "embedding" else (m.parameter, *m.tied)
            self._modules += [(m, loaded.model.get_submodule(name.rpartition(".")[0])) for name in users]

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Record one forward and backward pass."""
        with ExitStack() as stack:
            stack.callback(self._inputs.clear)
            for matrix, module in self._modules:
                stack.callback(module.register_forward_hook(self._hook(matrix)).remove)
            if self._embeddings or self._experts:
                stack.enter_context(_Calls(self))
            yield

    def collected(self) -> dict[str, Tensor]:
        """What is stored: Fisher, look-ups and Gram matrices in bf16, the rest float32; row weights with mean one."""
        result = {}
        for key, value in self.sums.items():
            kind = key.split("/", 1)[0]
            if kind == "row_weight":
                mean = value.mean()
                result[key] = value / mean if float(mean) > 0 else torch.ones_like(value)
                continue
            if kind in ("guided", "gram"):
                value.tril_().add_(value.tril(-1).T)
            result[key] = value.to(torch.bfloat16) if kind in ("fisher", "lookup", "gram") else value
        return result

    # -- what the hooks see -----------------------------------------------------------------------------------------

    def _hook(self, matrix: Matrix) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self._record(matrix, args[0], output)

        return hook

    def multiply(self, value: Tensor, weight: Tensor, output: Tensor) -> None:
        """A product with some weight [2-D]; recorded if it is a slice of a stack."""
        matrix = self._experts.get(weight.data_ptr())
        if matrix is not None:
            self._record(matrix, value, output)

    def look_up(self, ids: Tensor, weight: Tensor, output: Tensor) -> Tensor:
        """What a look-up in some table returns: for a watched table a leaf whose gradient is recorded."""
        matrix = next((m for m, parameter in self._embeddings if parameter.data_ptr() == weight.data_ptr()), None)
        if matrix is None:
            return output
        key, flat = f"lookup/{matrix.name}", ids.reshape(-1)
        leaf = output.detach().requires_grad_()

        def receive(gradient: Tensor) -> None:
            squares = gradient.detach().float().reshape(flat.numel(), -1).square().div_(self.tokens)
            self._sum(key, matrix.rows, matrix.cols).index_add_(0, flat, squares)

        _on_gradient(leaf, receive)
        return leaf

    # -- sums -------------------------------------------------------------------------------------------------------

    def _sum(self, key: str, *shape: int) -> Tensor:
        if key not in self.sums:
            self.sums[key] = torch.zeros(*shape)
        return self.sums[key]

    def _input(self, matrix: Matrix, value: Tensor) -> Tensor:
        """x [tokens, K] float32, cast once for all matrices that share it."""
        held = self._inputs.get(matrix.input)
        if held is not None and (held[0] is value or torch.equal(held[0], value)):
            return held[1]
        x = value.detach().float().reshape(-1, matrix.cols)
        self._inputs[matrix.input] = (value, x)
        return x

    def _record(self, matrix: Matrix, value: Tensor, output: Tensor) -> None:
        """Keep the input; when the output's gradient arrives, add what it tells."""
        if not output.requires_grad or not value.numel():
            return
        x, half = self._input(matrix, value), value.dtype

        def receive(gradient: Tensor) -> None:
            g2 = gradient.detach().float().reshape(-1, matrix.rows).square()  # a copy: autograd goes on with its own
            importance = g2.mean(1, keepdim=True)
            guided = self._sum(f"guided/{matrix.name}", matrix.cols, matrix.cols)
            add_moment(guided, x * importance, x, 1 / self.tokens)
            self._add_fisher(matrix, g2, x, half)
            if matrix.kind in ("linear", "expert"):
                self._add_gram(matrix, gradient, x)
            if matrix.kind in ("head", "embedding"):
                self._sum(f"row_weight/{matrix.name}", matrix.rows).add_(g2.sum(0))

        _on_gradient(output, receive)

    def _add_gram(self, matrix: Matrix, gradient: Tensor, x: Tensor) -> None:
        g = gradient.detach().float().reshape(-1, matrix.rows)
        weighted = g * x.square().mean(1, keepdim=True)
        add_moment(self._sum(f"gram/{matrix.name}", matrix.rows, matrix.rows), weighted, g, 1 / self.tokens)

    def _add_fisher(self, matrix: Matrix, g2: Tensor, x: Tensor, half: torch.dtype) -> None:
        """Sums of positive products: the model's own dtype is precise enough for each window's share (bf16: 2^-9)."""
        dtype = torch.bfloat16 if half == torch.bfloat16 else torch.float32
        peak = g2.max().clamp_min(1e-30)
        left, right = (g2 / peak).to(dtype), x.square().to(dtype)
        total = self._sum(f"fisher/{matrix.name}", matrix.rows, matrix.cols)
        scale = float(peak) / self.tokens
        for start in range(0, matrix.rows, ROW_BLOCK):
            rows = slice(start, start + ROW_BLOCK)
            if dtype == torch.float32:
                total[rows].addmm_(left[:, rows].T, right, alpha=scale)
            else:
                total[rows].add_((left[:, rows].T @ right).float(), alpha=scale)
