"""C++ for the CPU: generates the source of the kernel for one codec, and compiles it when first needed.

    format --kernel_for--> CpuKernel --emit--> one translation unit --compiler--> functions called by ctypes

A kernel is specialised on its codec alone; shapes, transforms, outliers and low-rank factors are passed at run time,
because no loop over codes depends on them. kernels/native/linear/linear.hpp describes the functions that a kernel must
provide. To support a new codec, add an entry to `CPU_KERNELS`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from reallm.kernels.formats.codecs import (
    AdditiveCodec,
    DenseCodec,
    KMeansCodec,
    LatticeCodec,
    NeuralCodec,
    ScalarCodec,
    TrellisCodec,
)
from reallm.kernels.formats.formats import Format

from .compiler import generated_library

_TEMPLATE = """\
// y = W_hat x for a matrix W stored as {label}: see linear.hpp for the contract and {header} for the method.
#include "entry.hpp"
#include "{header}"

namespace reallm {{
using Codec = {codec};
}}

REALLM_ENTRY(Codec)
"""


@dataclass(frozen=True, slots=True)
class CpuKernel:
    """Everything that a generated translation unit depends on; equal kernels give byte-equal sources."""

    label: str
    header: str
    codec: str

    @property
    def name(self) -> str:
        """The stem of the kernel's files."""
        return f"linear-{self.label}"


def _scalar(codec: ScalarCodec) -> CpuKernel:
    integers = codec.table in ("int", "uint")
    double = codec.double_quant
    table, zeros = "integers" if integers else "levels", str(codec.table == "uint").lower()
    scales = f"{double.bits}, {double.block}" if double else "0, 1"
    name = codec.name if integers else codec.name.replace(codec.table, "levels", 1)  # the levels are passed at run time
    return CpuKernel(name, "scalar.hpp", f"Scalar<Table::{table}, {codec.bits}, {codec.group_size}, {zeros}, {scales}>")


def _additive(codec: AdditiveCodec) -> CpuKernel:
    parameters = f"{codec.num_codebooks}, {codec.codebook_bits}, {codec.dim}"
    return CpuKernel(codec.name.removesuffix("-shared"), "vectors.hpp", f"Additive<{parameters}>")


def _kmeans(codec: KMeansCodec) -> CpuKernel:
    return CpuKernel(codec.name, "scalar.hpp", f"Scalar<Table::row_levels, {codec.bits}, 0, false, 0, 1>")


def _trellis(codec: TrellisCodec) -> CpuKernel:
    return CpuKernel(f"tq-l{codec.state_bits}", "trellis.hpp", f"Trellis<{codec.state_bits}>")


def _lattice(codec: LatticeCodec) -> CpuKernel:
    return CpuKernel(codec.name, "vectors.hpp", f"Lattice<{codec.bits}>")


def _dense(codec: DenseCodec) -> CpuKernel:
    return CpuKernel(codec.name, "vectors.hpp", f"Dense<Float::{codec.dtype}>")


CPU_KERNELS: Mapping[type, Callable[[Any], CpuKernel] | None] = {
    DenseCodec: _dense,
    ScalarCodec: _scalar,
    AdditiveCodec: _additive,
    KMeansCodec: _kmeans,
    TrellisCodec: _trellis,
    LatticeCodec: _lattice,
    NeuralCodec: None,
}
"""For each codec class, the kernel of a codec; None where torch decodes the weights instead (neural codecs)."""


def kernel_for(fmt: Format) -> CpuKernel | None:
    """The kernel for matrices stored as `fmt`; None if the codec has no kernel, so that torch decodes the weights."""
    kernel = CPU_KERNELS[type(fmt.codec)]
    return kernel(fmt.codec) if kernel else None


def emit(kernel: CpuKernel) -> str:
    """The C++ source of `kernel`, the same text for the same kernel on every machine."""
    return _TEMPLATE.format(label=kernel.label, header=kernel.header, codec=kernel.codec)


@dataclass(frozen=True, slots=True)
class CpuFunctions:
    """The entry points of a compiled kernel, and the addresses of its function tables."""

    library: ctypes.CDLL

    def kernels(self, rotated: bool) -> int:
        """Address of the `Kernels` of linear.hpp; for a rotated matrix they cannot compute single rows of W_hat."""
        return int(self.library.reallm_kernels(int(rotated)))

    def extra_floats(self, cols: int) -> int:
        """Number of extra floats that the kernel needs in memory after the prepared x of `cols` columns."""
        return int(self.library.reallm_behind(cols))

    @property
    def layout(self) -> int:
        """A number for how the extra floats are used; kernels with the same number can share a prepared x."""
        return int(self.library.reallm_layout())

    @property
    def linear(self) -> Callable[[int, int, int, int, int, int], int]:
        """The function that computes y = W_hat x: (operand, x, y, kind, batch, threads) -> 0, or 1 if out of memory.

        Operand, x and y are addresses; kind is the dtype of x and y, and batch the number of rows of x.

        This is the ctypes function itself: a Python wrapper would take a tenth of the time of a small product.
        """
        function: Callable[[int, int, int, int, int, int], int] = self.library.reallm_linear
        return function

    def rows(self, operand: int, index: int, count: int, out: int, kind: int) -> int:
        """Write `count` rows of W_hat to the address `out`; return 0, or 1 if memory ran out.

        `operand` and `index` (the numbers of the rows) are addresses too; `kind` is the dtype of the output.
        """
        return int(self.library.reallm_rows(operand, index, count, out, kind))


@cache
def load_functions(kernel: CpuKernel, abi_bytes: int) -> CpuFunctions | None:
    """The functions of `kernel`, compiled if necessary; None if that fails, in which case `compiler` logs a warning.

    `abi_bytes` is the size of the caller's Operand. Raises RuntimeError if linear.hpp's Operand has another size.
    """
    library = generated_library(kernel.name, emit(kernel))
    if library is None:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.reallm_abi_bytes.restype = library.reallm_behind.restype = library.reallm_layout.restype = number
    library.reallm_behind.argtypes = (number,)
    library.reallm_kernels.restype = pointer
    library.reallm_linear.argtypes = (pointer, pointer, pointer, ctypes.c_int, number, ctypes.c_int)
    library.reallm_rows.argtypes = (pointer, pointer, number, pointer, ctypes.c_int)
    if (native_bytes := library.reallm_abi_bytes()) != abi_bytes:
        raise RuntimeError(f"linear.hpp's Operand has {native_bytes} bytes, its mirror in Python {abi_bytes}")
    return CpuFunctions(library)
