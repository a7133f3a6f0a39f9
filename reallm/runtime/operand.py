"""The `Operand` of linear.hpp: one packed matrix as native kernels read it, filled from its fields."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reallm.decoding.field_reader import check_fields
from reallm.decoding.unpack import read_floats
from reallm.kernels.codes.hadamard import factors, signs
from reallm.kernels.codes.lattice import RESIDUAL_SCALE, SHIFT, absolute_vectors, odd_sign_parity, root_words
from reallm.kernels.codes.packing import unpack_codes
from reallm.kernels.codes.tables import table
from reallm.kernels.codes.trellis import WORDS_PER_WIDTH, check_widths
from reallm.kernels.formats.codecs import (
    AdditiveCodec,
    AnyCodec,
    DenseCodec,
    KMeansCodec,
    LatticeCodec,
    NeuralCodec,
    ScalarCodec,
    TrellisCodec,
)
from reallm.kernels.formats.formats import Format

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64


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


class OperandFiller:
    """Fills `operand` from the fields (uint8, on the CPU) of a matrix in `fmt`, after the same checks as `decode`."""

    def __init__(self, operand: Operand, fmt: Format, fields: Mapping[str, Tensor], layout: int) -> None:
        """`layout` is the layout of the kernel's prepared input. Raises ValueError for missing or wrong fields."""
        self.operand, self.fmt, self.fields, self.layout = operand, fmt, fields, layout
        self.rows, self.cols = int(operand.rows), int(operand.cols)
        self.tensors: list[Tensor] = []
        """The tensors that the operand points to; they must live as long as it is used."""
        stored = fmt.fields(self.rows, self.cols) + ((fmt.shared_field,) if fmt.shared_field else ())
        check_fields(stored, fields)
        self.stored = {field.name: field for field in stored}

    def fill(self) -> None:
        """Fill the whole operand. Raises ValueError for fields that contradict each other."""
        for name in ("codes", "residuals", "zeros", "scales", "scale_codes", "scale_ranges"):
            if name in self.stored:
                self.point_to_field(name, name)
        fill_codec = OPERAND_FILLERS[type(self.fmt.codec)]
        if fill_codec is None:
            raise ValueError(f"format {self.fmt.name} has no native kernel")
        fill_codec(self, self.fmt.codec)
        self._fill_transform()
        self._fill_sparse()
        self._fill_low_rank()

    def address(self, values: NDArray[Any] | Tensor) -> int:
        """The address of `values`, or of an aligned copy if they are an array; the memory is kept alive."""
        tensor = values if isinstance(values, Tensor) else _aligned(values)
        self.tensors.append(tensor)
        return tensor.data_ptr()

    def point_to(self, name: str, values: NDArray[Any] | Tensor) -> None:
        """Let the operand's pointer `name` point to `values`."""
        setattr(self.operand, name, self.address(values))

    def point_to_field(self, name: str, field: str) -> None:
        """Let the operand's pointer `name` point to the bytes of a field as they are stored."""
        self.point_to(name, self.fields[field].detach().contiguous())

    def floats(self, name: str) -> NDArray[np.float32]:
        """The values of the float field `name`, float32 [count]."""
        field = self.stored[name]
        return np.array(read_floats(self.fields[name], field.dtype, field.count).numpy(), np.float32)

    def codes(self, name: str) -> NDArray[np.uint16]:
        """The codes in the field `name`, uint16 [count]."""
        field = self.stored[name]
        return unpack_codes(self.fields[name].numpy(), int(field.dtype[1:]), field.count)

    def _fill_transform(self) -> None:
        """Fill permutation, column scales, rotations and `input_key`, which is equal if inputs are prepared equally."""
        fmt = self.fmt
        key = hashlib.sha256(f"{self.cols} {self.layout} {fmt.rotated}".encode())
        if fmt.permuted:
            order = self.codes("permutation").astype(np.int32)
            if not np.array_equal(np.sort(order), np.arange(self.cols)):
                raise ValueError("field 'permutation' is not a permutation of the columns")
            key.update(order.tobytes())
            self.point_to("permutation", order)
        if fmt.channel_scales:
            scales = self.floats("channel_scales")
            key.update(b"scales" + scales.tobytes())
            self.point_to("channel_scales", scales)
        if fmt.rotated:
            self.operand.input, self.operand.output = self._rotation(self.cols), self._rotation(self.rows)
        self.operand.input_key = int.from_bytes(key.digest()[:8], "little") | 1

    def _rotation(self, order: int) -> Rotation:
        base, power, scaled_signs = _rotation_parts(order)
        return Rotation(order, power, self.address(base), self.address(scaled_signs))

    def _fill_sparse(self) -> None:
        if not self.fmt.sparse:
            return
        counts, columns = self.codes("sparse_counts").astype(np.int64), self.codes("sparse_cols")
        if int(counts.sum()) != len(columns) or (columns.size and int(columns.max()) >= self.cols):
            raise ValueError("the sparse fields contradict each other")
        self.point_to("sparse_starts", np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
        self.point_to("sparse_cols", columns)
        self.point_to_field("sparse_values", "sparse_values")

    def _fill_low_rank(self) -> None:
        term, operand = self.fmt.low_rank, self.operand
        if not term:
            return
        operand.rank, operand.factor_bits = term.rank, {"f16": 16, "i8": 8, "i4": 4}[term.dtype]
        self.point_to_field("left", "left")
        self.point_to_field("right", "right")
        if term.dtype != "f16":
            self.point_to("left_scales", self.floats("left_scales"))
            self.point_to("right_scales", self.floats("right_scales"))


def _fill_trellis(filler: OperandFiller, codec: TrellisCodec) -> None:
    widths = filler.codes("widths").astype(np.uint8)
    check_widths(codec, widths, filler.cols)
    row_tiles, _ = codec.grid(filler.rows, filler.cols)
    wide = widths.astype(np.int64)
    filler.point_to_field("codes", "words")
    filler.point_to("widths", widths)
    filler.point_to("starts", (np.cumsum(wide) - wide) * row_tiles * WORDS_PER_WIDTH)


def _fill_scalar(filler: OperandFiller, codec: ScalarCodec) -> None:
    levels = table(codec.table, codec.bits)
    filler.point_to("table", np.pad(levels, (0, max(0, 8 - len(levels)))))
    if codec.double_quant:
        filler.operand.scale_min = filler.floats("scale_min")[0]


def _fill_additive(filler: OperandFiller, codec: AdditiveCodec) -> None:
    filler.point_to("table", np.pad(filler.floats("codebooks"), (0, 2)))


def _fill_lattice(filler: OperandFiller, codec: LatticeCodec) -> None:
    filler.point_to("table", _lattice_table(codec.bits))


def _fill_kmeans(filler: OperandFiller, codec: KMeansCodec) -> None:
    filler.point_to_field("scales", "levels")


def _fill_dense(filler: OperandFiller, codec: DenseCodec) -> None:
    filler.point_to_field("codes", "values")


OPERAND_FILLERS: Mapping[type[AnyCodec], Callable[[OperandFiller, Any], None] | None] = {
    DenseCodec: _fill_dense,
    ScalarCodec: _fill_scalar,
    KMeansCodec: _fill_kmeans,
    AdditiveCodec: _fill_additive,
    LatticeCodec: _fill_lattice,
    TrellisCodec: _fill_trellis,
    NeuralCodec: None,
}
"""Codec -> the function that fills its own parts of the operand; None for codecs without a native kernel."""


def _aligned(values: NDArray[Any]) -> Tensor:
    """A copy of `values` in memory that torch aligns, so that no word of a table lies in two cache lines."""
    return torch.from_numpy(values).clone()


@cache
def _rotation_parts(order: int) -> tuple[Tensor, int, Tensor]:
    """Parts of a rotation: the base matrix B, the power 2^a and signs / sqrt(order), float32; cached by order."""
    base, power = factors(order)
    return _aligned(np.array(base, np.float32)), power, _aligned((signs(order) / order**0.5).astype(np.float32))


@cache
def _lattice_table(bits: int) -> Tensor:
    """The float32 table that `Lattice` of vectors.hpp reads; cached by the number of bits.

    It holds the vectors, the signs as bit patterns, the shifts and, at 3 bits, the second words.
    """
    vectors = absolute_vectors().astype(np.float32)
    vectors[:, 7] *= np.where(odd_sign_parity(), -1, 1)
    low = np.arange(256)
    minus = (low[:, None] >> np.arange(1, 8)) & 1
    flips = np.concatenate([minus, minus.sum(1, keepdims=True) & 1], 1).astype(np.uint32) << np.uint32(31)
    shifts = np.where(low & 1, SHIFT, -SHIFT).astype(np.float32)
    second = root_words() * RESIDUAL_SCALE[3] if bits == 3 else np.empty(0)
    parts = vectors.ravel(), flips.view(np.float32).ravel(), shifts, second.ravel().astype(np.float32)
    return _aligned(np.concatenate(parts))
