"""Native kernels on the CPU: a packed matrix is multiplied as it is stored, without a decoded weight in memory.

    Packed --operand--> NativeMatrix (an `Operand` of linear.hpp) --> y = W_hat x, or rows of W_hat

Native kernels are used for calls without autograd, for any number of rows of x. The decoded weight is used instead if
the format has no kernel or the machine has no compiler. The kernels compute with float32 weights whatever the dtype of
x. An Operand points into the fields of the packed module, so it is built again whenever they change
(`Packed.drop_cache`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from reallm.codegen.cpu.linear import CpuFunctions, kernel_for, load_functions
from reallm.kernels.formats.formats import Format

from .operand import Operand, OperandFiller

_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
PAD = 32
"""The columns of the prepared x are rounded up to a multiple of this (kPad of kernel.hpp)."""


class NativeMatrix:
    """One packed matrix W[rows, cols] ready for the native kernels; keeps alive whatever its Operand points to."""

    def __init__(self, fmt: Format, fields: Mapping[str, Tensor], rows: int, cols: int, built: CpuFunctions) -> None:
        self.rows, self.cols, self.built = rows, cols, built
        self.operand = Operand(rows=rows, cols=cols, kernels=built.kernels(fmt.rotated))
        self.operand.prepared = -(-cols // PAD) * PAD + built.extra_floats(cols)
        self.looks_up = not fmt.rotated
        """Whether single rows can be decoded."""
        self.address = ctypes.addressof(self.operand)
        self._linear = built.linear
        self._filler = OperandFiller(self.operand, fmt, fields, built.layout)
        self._filler.fill()

    def __deepcopy__(self, memo: object) -> None:
        """Return None, so that a copied module builds an operand that points to its own fields."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def add_gain(self, gain: Tensor) -> None:
        """Make the kernels multiply the rows of W_hat by a copy of `gain` [rows]."""
        self._filler.point_to("gain", gain.detach().to(torch.float32, copy=True).contiguous())

    def add_bias(self, bias: Tensor) -> None:
        """Make the kernels add a copy of `bias` [rows] to the product."""
        self._filler.point_to("bias", bias.detach().to(torch.float32).clone())

    def linear(self, inputs: Tensor) -> Tensor:
        """y = x W_hat^T, [..., rows], for x [..., cols] of a dtype in `_KINDS`."""
        x = inputs.contiguous()
        y = torch.empty((*x.shape[:-1], self.rows), dtype=x.dtype)
        batch = x.numel() // self.cols
        if self._linear(self.address, x.data_ptr(), y.data_ptr(), _KINDS[x.dtype], batch, torch.get_num_threads()):
            raise MemoryError(f"not enough memory for {batch} rows of a [{self.rows}, {self.cols}] matrix")
        return y

    def lookup(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows `index` (integers [...]) of W_hat, [..., cols]. Raises IndexError for a row that does not exist."""
        rows = index.detach().to(torch.int64).contiguous()
        if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < self.rows:
            raise IndexError(f"rows {int(rows.min())} to {int(rows.max())} of a matrix of {self.rows}")
        out = torch.empty(*rows.shape, self.cols, dtype=dtype)
        if self.built.rows(self.address, rows.data_ptr(), rows.numel(), out.data_ptr(), _KINDS[dtype]):
            raise MemoryError(f"not enough memory for {rows.numel()} rows of {self.cols}")
        return out


def native_matrix(
    fmt: Format, fields: Mapping[str, Tensor], rows: int, cols: int, shared: Tensor | None = None
) -> NativeMatrix | None:
    """The native matrix of `fields` (uint8, on the CPU); None if the format has no kernel or it cannot be built here.

    `shared` are the shared codebooks, if the format uses them. Raises ValueError for fields that have a wrong size or
    contradict each other.
    """
    kernel = kernel_for(fmt)
    built = load_functions(kernel, ctypes.sizeof(Operand)) if kernel else None
    if built is None:
        return None
    if fmt.shared_field:
        if shared is None:
            raise ValueError(f"format {fmt.name} needs its shared codebooks")
        fields = {**fields, fmt.shared_field.name: shared}
    return NativeMatrix(fmt, fields, rows, cols, built)


def can_multiply(inputs: Tensor) -> bool:
    """Whether native kernels can take `inputs`: a plain CPU tensor of a supported dtype, and no gradient is needed."""
    plain = type(inputs) in (Tensor, torch.nn.Parameter) and inputs.device.type == "cpu" and inputs.dtype in _KINDS
    return plain and not (torch.is_grad_enabled() and inputs.requires_grad) and not torch.compiler.is_compiling()


def can_look_up(index: Tensor, dtype: torch.dtype) -> bool:
    """Whether native kernels can look up the rows `index` of a weight of `dtype`."""
    plain = type(index) is Tensor and index.device.type == "cpu" and index.dtype in (torch.int64, torch.int32)
    return plain and dtype in _KINDS and not torch.compiler.is_compiling()
