"""Hooks that compute statistics from the inputs and output gradients of matrices while a model runs.

Linear layers are watched by forward hooks. Embedding look-ups and products with slices of 3-D expert stacks are watched
as function calls, so that other operations of the same module (Gemma scales its look-ups) do not affect the statistics;
so are products of linear layers that are not called themselves (Mamba's dt_proj) or do more than multiply.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from reallm.models.loaded import LoadedModel, Matrix
from reallm.system.scratch import Scratch

ROW_BLOCK = 8192
"""Number of rows of an output head's Fisher information that are updated at a time, to save memory."""
PANELS = 4
"""Number of panels into which a symmetric sum is cut; each is computed only up to the diagonal, which saves 3/8 of the
work."""
_PRODUCTS = frozenset({nn.functional.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__})

_STACKED_PRODUCTS = frozenset({torch.bmm, torch.matmul, Tensor.bmm, Tensor.matmul, Tensor.__matmul__})
_WATCHED = _PRODUCTS | _STACKED_PRODUCTS
_PLAIN_FORWARDS = (nn.Linear.forward, Conv1D.forward)
"""Classes with another forward method may do more than multiply; of them the product itself is watched."""


def _on_gradient(output: Tensor, receive: Callable[[Tensor], None]) -> None:
    output.register_hook(receive)  # type: ignore[no-untyped-call]  # torch leaves it unannotated


def add_moment(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """Add scale left^T right to the lower triangle of `total` [n, n], for `left` and `right` [tokens, n].

    Only some entries above the diagonal are updated; they must not be read.
    """
    width = -(-len(total) // PANELS)
    for start in range(0, len(total), width):
        stop = start + width
        total[start:stop, :stop].addmm_(left[:, start:stop].T, right[:, :stop], alpha=scale)


def sums_nbytes(matrix: Matrix) -> int:
    """Bytes of the sums of one matrix."""
    return 4 * (matrix.cols**2 + matrix.numel + (matrix.rows**2 if matrix.kind in ("linear", "expert") else 0))


class _WatchedCalls(TorchFunctionMode):
    """Passes embedding look-ups, and products with watched weights, on to `hooks`."""

    def __init__(self, hooks: StatisticsHooks, every_lookup: bool) -> None:
        super().__init__()
        self.hooks, self.every_lookup = hooks, every_lookup

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is nn.functional.embedding:
            output = self.hooks.on_lookup(args[0], args[1], output)
            if self.every_lookup and not output.requires_grad:
                output = output.detach().requires_grad_().clone()
            return output
        if func in _WATCHED and len(args) > 1 and isinstance(args[1], Tensor):
            if args[1].dim() == 2:
                self.hooks.on_product(args[0], args[1], output, func is nn.functional.linear)
            if func in _STACKED_PRODUCTS and args[1].dim() == 3:
                self.hooks.on_stack_product(args[0], args[1], output)
            if func in _PRODUCTS and func is not nn.functional.linear and args[0].dim() == 2:
                self.hooks.on_left_product(args[0], args[1], output)
        return output


class StatisticsHooks:
    """Accumulates the statistics of `matrices`, in float32, over many forward and backward passes."""

    def __init__(
        self,
        loaded: LoadedModel,
        matrices: Sequence[Matrix],
        tokens: int,
        sums: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Start with empty sums, or with the `sums` of earlier passes, which are then added to in place.

        `tokens` is the number of tokens of the whole text, by which every sum is divided.
        """
        self.tokens = tokens
        self.device = loaded.model.device
        self.sums: dict[str, Tensor] = {key: value.to(self.device) for key, value in (sums or {}).items()}
        """Key "<kind>/<matrix name>" -> sum over the tokens seen so far."""
        self.scratch: Scratch | None = None
        """Where the sums are; None for memory."""
        self._inputs: dict[str, tuple[Tensor, Tensor]] = {}
        self._modules: list[tuple[Matrix, nn.Module]] = []
        self._embeddings: list[tuple[Matrix, Tensor]] = []
        self._slices: dict[int, Matrix] = {}
        self._weights: dict[int, tuple[Matrix, Tensor]] = {}
        self._running: set[int] = set()
        """Addresses of the weights whose modules are being called."""
        for m in matrices:
            parameter = loaded.model.get_parameter(m.parameter)
            if m.kind == "expert":
                self._slices[parameter[m.expert or 0].data_ptr()] = m
                continue
            if m.kind == "embedding":
                self._embeddings.append((m, parameter))
            elif not m.transposed:
                self._weights[parameter.data_ptr()] = (m, parameter)
            users = m.tied if m.kind == "embedding" else (m.parameter, *m.tied)
            modules = [loaded.model.get_submodule(name.rpartition(".")[0]) for name in users]
            self._modules += [(m, module) for module in modules if type(module).forward in _PLAIN_FORWARDS]

    @contextmanager
    def recording(self, *, every_lookup: bool = False) -> Iterator[None]:
        """Record one forward and backward pass, run within this context.

        With `every_lookup`, gradients also flow to look-ups in embeddings whose statistics are not gathered, so that
        everything computed from them is recorded.
        """
        with ExitStack() as stack:
            stack.callback(self._inputs.clear)
            stack.callback(self._running.clear)
            for matrix, module in self._modules:
                stack.callback(module.register_forward_pre_hook(self._starts).remove)
                stack.callback(module.register_forward_hook(self._module_hook(matrix), with_kwargs=True).remove)
            if every_lookup or self._embeddings or self._slices or self._weights:
                stack.enter_context(_WatchedCalls(self, every_lookup))
            yield

    def statistics(self, names: Container[str] | None = None) -> dict[str, Tensor]:
        """The statistics of the matrices `names` (None: of all) as they are stored; call this after their last pass.

        Fisher information, look-ups and Gram matrices are bf16, the others float32; row weights have mean one.
        """
        result = {}
        for key, value in self.sums.items():
            kind, name = key.split("/", 1)
            if names is not None and name not in names:
                continue
            if kind == "row_weight":
                mean = value.mean()
                result[key] = value / mean if float(mean) > 0 else torch.ones_like(value)
                continue
            if kind in ("guided", "gram"):
                value.tril_().add_(value.tril(-1).T)
            result[key] = self._in_bfloat16(value) if kind in ("fisher", "lookup", "gram") else value
        return result

    def _in_bfloat16(self, value: Tensor) -> Tensor:
        return value.to(torch.bfloat16) if self.scratch is None else self.scratch.copy(value, torch.bfloat16)

    # -- what the hooks see -----------------------------------------------------------------------------------------

    def _starts(self, module: nn.Module, _args: tuple[Any, ...]) -> None:
        self._running.add(module.weight.data_ptr())  # type: ignore[operator]  # a matrix

    def _module_hook(self, matrix: Matrix) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self._running.discard(module.weight.data_ptr())  # type: ignore[operator]
            value = args[0] if args else next(iter(kwargs.values()))
            self._record(matrix, value, output)

        return hook

    def on_product(self, value: Tensor, weight: Tensor, output: Tensor, is_linear: bool) -> None:
        """Record a product of `value` with the 2-D `weight`: x W^T if `is_linear`, else x W.

        `weight` counts if it is a slice of a watched stack of experts, or the watched weight of a module that is not
        being called (Mamba's dt_proj).
        """
        matrix = self._slices.get(weight.data_ptr())
        if matrix is not None:
            self._record(matrix, value, output)
            return
        matrix, parameter = self._weights.get(weight.data_ptr(), (None, None))
        if matrix is None or parameter is None or weight.data_ptr() in self._running:
            return
        expected = parameter if is_linear else parameter.T
        if weight.shape == expected.shape and weight.stride() == expected.stride():
            self._record(matrix, value, output)

    def on_stack_product(self, value: Tensor, stack: Tensor, output: Tensor) -> None:
        """Record products of `value` [experts, tokens, K] with all slices of a watched stack at once (Llama 4)."""
        matrices = [self._slices.get(weight.data_ptr()) for weight in stack]
        if value.dim() != 3 or len(value) != len(matrices) or not output.requires_grad:
            return
        receivers = [
            None if matrix is None else self._receiver(matrix, part)
            for matrix, part in zip(matrices, value, strict=True)
        ]

        def receive(gradient: Tensor) -> None:
            for receiver, part in zip(receivers, gradient, strict=True):
                if receiver is not None:
                    receiver(part)

        _on_gradient(output, receive)

    def on_left_product(self, weight: Tensor, value: Tensor, output: Tensor) -> None:
        """Record a product W x of the watched weight of a module that is not being called with columns `value`."""
        matrix, parameter = self._weights.get(weight.data_ptr(), (None, None))
        if matrix is None or parameter is None or weight.data_ptr() in self._running:
            return
        if weight.shape == parameter.shape and weight.stride() == parameter.stride():
            self._record(matrix, value.transpose(-1, -2), output, columns=True)

    def on_lookup(self, ids: Tensor, weight: Tensor, output: Tensor) -> Tensor:
        """The tensor that a look-up of `ids` in table `weight` must return in place of `output`.

        It is a new leaf tensor whose gradient is recorded if the table is watched, else `output` itself.
        """
        matrix = next((m for m, parameter in self._embeddings if parameter.data_ptr() == weight.data_ptr()), None)
        if matrix is None:
            return output
        key, flat = f"lookup/{matrix.name}", ids.reshape(-1)
        leaf = output.detach().requires_grad_()

        def receive(gradient: Tensor) -> None:
            squares = gradient.detach().float().reshape(flat.numel(), -1).square().div_(self.tokens)
            self._sum(key, matrix.rows, matrix.cols).index_add_(0, flat, squares)

        _on_gradient(leaf, receive)
        return leaf.clone()  # a model may change it in place, which a leaf does not allow

    # -- sums -------------------------------------------------------------------------------------------------------

    def _sum(self, key: str, *shape: int) -> Tensor:
        if key not in self.sums:
            self.sums[key] = (
                torch.zeros(*shape, device=self.device) if self.scratch is None else self.scratch.zeros(shape)
            )
        return self.sums[key]

    def _input(self, matrix: Matrix, value: Tensor) -> Tensor:
        """The input x [tokens, K] in float32, converted once for all matrices with the same input."""
        cached = self._inputs.get(matrix.input)
        if cached is not None and (cached[0] is value or torch.equal(cached[0], value)):
            return cached[1]
        x = value.detach().float().reshape(-1, matrix.cols)
        self._inputs[matrix.input] = (value, x)
        return x

    def _record(self, matrix: Matrix, value: Tensor, output: Tensor, *, columns: bool = False) -> None:
        """Remember the input `value`; when the gradient of `output` arrives, update the sums of `matrix` with both.

        With `columns` the output has one column per token instead of one row.
        """
        if not output.requires_grad or not value.numel():
            return
        receive = self._receiver(matrix, value)
        _on_gradient(output, (lambda gradient: receive(gradient.transpose(-1, -2))) if columns else receive)

    def _receiver(self, matrix: Matrix, value: Tensor) -> Callable[[Tensor], None]:
        """A function that takes the gradient of an output and updates the sums of `matrix` with it and `value`."""
        x, input_dtype = self._input(matrix, value), value.dtype

        def receive(gradient: Tensor) -> None:
            g = gradient.detach().float().reshape(-1, matrix.rows)
            g2 = g.square()
            importance = g2.mean(1, keepdim=True)
            guided = self._sum(f"guided/{matrix.name}", matrix.cols, matrix.cols)
            add_moment(guided, x * importance, x, 1 / self.tokens)
            self._add_fisher(matrix, g2, x, input_dtype)
            if matrix.kind in ("linear", "expert"):
                self._add_gram(matrix, g, x)
                self._sum(f"count/{matrix.name}", 1).add_(len(x))
            if matrix.kind in ("head", "embedding"):
                self._sum(f"row_weight/{matrix.name}", matrix.rows).add_(g2.sum(0))

        return receive

    def _add_gram(self, matrix: Matrix, g: Tensor, x: Tensor) -> None:
        weighted = g * x.square().mean(1, keepdim=True)
        add_moment(self._sum(f"gram/{matrix.name}", matrix.rows, matrix.rows), weighted, g, 1 / self.tokens)

    def _add_fisher(self, matrix: Matrix, g2: Tensor, x: Tensor, input_dtype: torch.dtype) -> None:
        """Add sum_t g_ti^2 x_tj^2, computed in bf16 where the input is bf16.

        No term is negative, so the relative error of 2^-9 of bf16 also bounds that of each window's contribution.
        """
        dtype = torch.bfloat16 if input_dtype == torch.bfloat16 else torch.float32
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
