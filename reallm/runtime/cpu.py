"""Native kernels on the CPU: a packed matrix is multiplied as it is stored, and no weight is ever decoded to memory.

    Packed --operand--> NativeMatrix (an `Operand` of kernels/native/linear.hpp) --> y = W_hat x, or rows of W_hat

Used without autograd and for any number of rows of x; what has no kernel, or cannot be built here, takes the decoded
weight. Weights are float32 here whatever the dtype of x. An Operand points into the module's own fields, so it is made
anew whenever they change (`Packed.forget`).
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reallm.codegen.cpu.linear import CpuFunctions, functions, kernel_for
from reallm.decoding.decode import check_fields, read_floats
from reallm.kernels.codes.hadamard import factors, signs
from reallm.kernels.codes.lattice import RESIDUAL_SCALE, SHIFT, absolute_vectors, odd_minuses, root_words
from reallm.kernels.codes.packing import unpack_codes
from reallm.kernels.codes.tables import table
from reallm.kernels.codes.trellis import WORDS_PER_WIDTH, check_widths
from reallm.kernels.formats.codecs import AdditiveCodec, LatticeCodec, ScalarCodec, TrellisCodec
from reallm.kernels.formats.formats import Format

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
PAD = 32
"""Columns of the prepared x are rounded up to a multiple of it (kPad of kernel.hpp)."""
Kept = NDArray[Any] | Tensor


class Rotation(ctypes.Structure):
    """`Rotation` of linear.hpp."""

    _fields_ = (("order", _INT), ("power", _INT), ("base", _POINTER), ("signs", _POINTER))


class Operand(ctypes.Structure):
    """`Operand` of linear.hpp, field by field."""

    _fields_ = (
        ("kernels", _POINTER),
        *((name, _INT) for name in ("rows", "cols", "prepared")),
        ("input_key", ctypes.c_uint64),
        *((name, _POINTER) for name in ("codes", "residuals", "zeros", "scales", "scale_codes", "scale_ranges")),
        *((name, _POINTER) for name in ("table", "widths", "starts", "channel_scales", "permutation")),
        ("input", Rotation),
        ("output", Rotation),
        *((name, _POINTER) for name in ("sparse_starts", "sparse_cols", "sparse_values")),
        *((name, _POINTER) for name in ("left", "right", "left_scales", "right_scales", "gain", "bias")),
        ("rank", _INT),
        ("scale_min", ctypes.c_float),
        ("factor_bits", ctypes.c_int32),
    )


class NativeMatrix:
    """One packed matrix W[rows, cols] ready for the native kernels; keeps alive whatever its Operand points to."""

    def __init__(self, fmt: Format, fields: Mapping[str, Tensor], rows: int, cols: int, built: CpuFunctions) -> None:
        self.rows, self.cols, self.built = rows, cols, built
        self.kept: list[Tensor] = []
        self.operand = Operand(rows=rows, cols=cols, kernels=built.kernels(fmt.rotated))
        self.operand.prepared = -(-cols // PAD) * PAD + built.behind(cols)
        self.looks_up = not fmt.rotated
        self.address = ctypes.addressof(self.operand)
        """Of the Operand."""
        self._linear = built.linear
        _Filling(self, fmt, fields).fill()

    def __deepcopy__(self, memo: object) -> None:
        """None: a copied module makes its own operand."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def pointer(self, values: Kept) -> int:
        """The address of `values`, which are kept; of an array, of an aligned copy."""
        held = values if isinstance(values, Tensor) else _aligned(values)
        self.kept.append(held)
        return held.data_ptr()

    def add_gain(self, gain: Tensor) -> None:
        """Make the operand multiply its rows by a copy of `gain` [rows]."""
        self.operand.gain = self.pointer(gain.detach().to(torch.float32, copy=True).contiguous())

    def add_bias(self, bias: Tensor) -> None:
        """Make the operand add a copy of `bias` [rows]."""
        self.operand.bias = self.pointer(bias.detach().to(torch.float32).clone())

    def linear(self, inputs: Tensor) -> Tensor:
        """x W_hat^T for x [..., cols] of a dtype in `_KINDS`: [..., rows]."""
        x = inputs.contiguous()
        y = torch.empty((*x.shape[:-1], self.rows), dtype=x.dtype)
        batch = x.numel() // self.cols
        if self._linear(self.address, x.data_ptr(), y.data_ptr(), _KINDS[x.dtype], batch, torch.get_num_threads()):
            raise MemoryError(f"no memory for {batch} rows of a [{self.rows}, {self.cols}] matrix")
        return y

    def lookup(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows `index` (int64, any shape) of W_hat: [..., cols]. Raises IndexError for a row that is not there."""
        where = index.detach().to(torch.int64).contiguous()
        if where.numel() and not 0 <= int(where.min()) <= int(where.max()) < self.rows:
            raise IndexError(f"rows {int(where.min())} to {int(where.max())} of a matrix of {self.rows}")
        out = torch.empty(*where.shape, self.cols, dtype=dtype)
        if self.built.rows(self.address, where.data_ptr(), where.numel(), out.data_ptr(), _KINDS[dtype]):
            raise MemoryError(f"no memory for {where.numel()} rows of {self.cols}")
        return out


class _Filling:
    """Fills the Operand of `matrix` from the fields of `fmt`, which it checks as `decode` does."""

    def __init__(self, matrix: NativeMatrix, fmt: Format, fields: Mapping[str, Tensor]) -> None:
        self.matrix, self.fmt, self.fields = matrix, fmt, fields
        stored = fmt.fields(matrix.rows, matrix.cols) + ((fmt.shared_field,) if fmt.shared_field else ())
        check_fields(stored, fields)
        self.stored = {field.name: field for field in stored}

    def raw(self, name: str) -> int:
        """Address of a field's bytes as they are stored."""
        return self.matrix.pointer(self.fields[name].detach().contiguous())

    def floats(self, name: str) -> NDArray[np.float32]:
        field = self.stored[name]
        return np.array(read_floats(self.fields[name], field.dtype, field.count).numpy(), np.float32)

    def codes(self, name: str) -> NDArray[np.uint16]:
        field = self.stored[name]
        return unpack_codes(self.fields[name].numpy(), int(field.dtype[1:]), field.count)

    def point(self, name: str, values: Kept) -> None:
        setattr(self.matrix.operand, name, self.matrix.pointer(values))

    def fill(self) -> None:
        """All of the Operand. Raises ValueError for fields that contradict themselves."""
        for name in ("codes", "residuals", "zeros", "scales", "scale_codes", "scale_ranges"):
            if name in self.stored:
                setattr(self.matrix.operand, name, self.raw(name))
        self._codec()
        self._transform()
        self._sparse()
        self._low_rank()

    def _codec(self) -> None:
        codec, operand = self.fmt.codec, self.matrix.operand
        if isinstance(codec, TrellisCodec):
            widths = self.codes("widths").astype(np.uint8)
            check_widths(codec, widths, self.matrix.cols)
            down, _ = codec.grid(self.matrix.rows, self.matrix.cols)
            wide = widths.astype(np.int64)
            operand.codes = self.raw("words")
            self.point("widths", widths)
            self.point("starts", (np.cumsum(wide) - wide) * down * WORDS_PER_WIDTH)
        elif isinstance(codec, ScalarCodec):
            levels = table(codec.table, codec.bits)
            self.point("table", np.pad(levels, (0, max(0, 8 - len(levels)))))
            if codec.double_quant:
                operand.scale_min = self.floats("scale_min")[0]
        elif isinstance(codec, AdditiveCodec):
            self.point("table", np.pad(self.floats("codebooks"), (0, 2)))
        elif isinstance(codec, LatticeCodec):
            self.point("table", _lattice_table(codec.bits))
        elif "levels" in self.stored:
            operand.scales = self.raw("levels")
        elif "values" in self.stored:
            operand.codes = self.raw("values")

    def _transform(self) -> None:
        fmt, matrix = self.fmt, self.matrix
        key = hashlib.sha256(f"{matrix.cols} {matrix.built.layout} {fmt.rotated}".encode())
        if fmt.permuted:
            order = self.codes("permutation").astype(np.int32)
            if not np.array_equal(np.sort(order), np.arange(matrix.cols)):
                raise ValueError("field 'permutation' is not a permutation of the columns")
            key.update(order.tobytes())
            self.point("permutation", order)
        if fmt.channel_scales:
            scales = self.floats("channel_scales")
            key.update(b"scales" + scales.tobytes())
            self.point("channel_scales", scales)
        if fmt.rotated:
            matrix.operand.input, matrix.operand.output = self._rotation(matrix.cols), self._rotation(matrix.rows)
        matrix.operand.input_key = int.from_bytes(key.digest()[:8], "little") | 1

    def _rotation(self, order: int) -> Rotation:
        base, power, scaled = _rotation_parts(order)
        return Rotation(order, power, self.matrix.pointer(base), self.matrix.pointer(scaled))

    def _sparse(self) -> None:
        if not self.fmt.sparse:
            return
        counts, where = self.codes("sparse_counts").astype(np.int64), self.codes("sparse_cols")
        if int(counts.sum()) != len(where) or (where.size and int(where.max()) >= self.matrix.cols):
            raise ValueError("the sparse fields contradict each other")
        self.point("sparse_starts", np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
        self.point("sparse_cols", where)
        self.matrix.operand.sparse_values = self.raw("sparse_values")

    def _low_rank(self) -> None:
        term, operand = self.fmt.low_rank, self.matrix.operand
        if not term:
            return
        operand.rank, operand.factor_bits = term.rank, {"f16": 16, "i8": 8, "i4": 4}[term.dtype]
        operand.left, operand.right = self.raw("left"), self.raw("right")
        if term.dtype != "f16":
            self.point("left_scales", self.floats("left_scales"))
            self.point("right_scales", self.floats("right_scales"))


def _aligned(values: NDArray[Any]) -> Tensor:
    """A copy where torch aligns it: no word of a table lies in two cache lines."""
    return torch.from_numpy(values).clone()


@cache
def _rotation_parts(order: int) -> tuple[Tensor, int, Tensor]:
    """B, 2^a and the signs over sqrt(order), float32, one copy for all matrices."""
    base, power = factors(order)
    return _aligned(np.array(base, np.float32)), power, _aligned((signs(order) / order**0.5).astype(np.float32))


@cache
def _lattice_table(bits: int) -> Tensor:
    """What vectors.hpp's Lattice reads: vectors, signs as bit patterns, shifts and, at 3 bits, the second words.

    One copy for all matrices.
    """
    vectors = absolute_vectors().astype(np.float32)
    vectors[:, 7] *= np.where(odd_minuses(), -1, 1)
    low = np.arange(256)
    minus = (low[:, None] >> np.arange(1, 8)) & 1
    flips = np.concatenate([minus, minus.sum(1, keepdims=True) & 1], 1).astype(np.uint32) << np.uint32(31)
    shifts = np.where(low & 1, SHIFT, -SHIFT).astype(np.float32)
    second = root_words() * RESIDUAL_SCALE[3] if bits == 3 else np.empty(0)
    parts = vectors.ravel(), flips.view(np.float32).ravel(), shifts, second.ravel().astype(np.float32)
    return _aligned(np.concatenate(parts))


def native_matrix(
    fmt: Format, fields: Mapping[str, Tensor], rows: int, cols: int, shared: Tensor | None = None
) -> NativeMatrix | None:
    """The matrix of `fields` (uint8, on the CPU; `shared` its shared codebooks), or None where it has no kernel here.

    Raises ValueError for fields of a wrong size or that contradict themselves.
    """
    kernel = kernel_for(fmt)
    built = functions(kernel, ctypes.sizeof(Operand)) if kernel else None
    if built is None:
        return None
    if fmt.shared_field:
        if shared is None:
            raise ValueError(f"format {fmt.name} needs its shared codebooks")
        fields = {**fields, fmt.shared_field.name: shared}
    return NativeMatrix(fmt, fields, rows, cols, built)


def can_multiply(inputs: Tensor) -> bool:
    """Whether native kernels may take `inputs`: plain, on the CPU, of a dtype they know, and no gradient is wanted."""
    plain = type(inputs) in (Tensor, torch.nn.Parameter) and inputs.device.type == "cpu" and inputs.dtype in _KINDS
    return plain and not (torch.is_grad_enabled() and inputs.requires_grad) and not torch.compiler.is_compiling()


def can_look_up(index: Tensor, dtype: torch.dtype) -> bool:
    """Whether native kernels may look up the rows `index` of a weight of `dtype`."""
    plain = type(index) is Tensor and index.device.type == "cpu" and index.dtype in (torch.int64, torch.int32)
    return plain and dtype in _KINDS and not torch.compiler.is_compiling()
