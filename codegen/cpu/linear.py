"""C++ for the CPU: the source of the kernel of one kind of codes, built by `native` when first needed.

    format --kernel_for--> CpuKernel --emit--> one translation unit --native.generated--> functions by ctypes

A kernel is specialised on its codec alone; shapes, transforms, outliers and factors are data, because none of them is
looked at in a loop over codes. The contract of the functions is kernels/native/linear.hpp.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from reallm.kernels.formats.codecs import (
    AdditiveCodec,
    DenseCodec,
    KMeansCodec,
    LatticeCodec,
    ScalarCodec,
    TrellisCodec,
)
from reallm.kernels.formats.formats import Format

from .compiler import generated

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
    """Everything a generated translation unit depends on; equal kernels give byte-equal sources."""

    label: str
    header: str
    codec: str

    @property
    def name(self) -> str:
        """The stem of its files."""
        return f"linear-{self.label}"


def kernel_for(fmt: Format) -> CpuKernel | None:
    """The kernel of a matrix's codes, or None: a neural decoder has none, its weights are decoded by torch."""
    codec = fmt.codec
    if isinstance(codec, TrellisCodec):
        return CpuKernel(f"tq-l{codec.state_bits}", "trellis.hpp", f"Trellis<{codec.state_bits}>")
    if isinstance(codec, ScalarCodec):
        return _scalar(codec)
    if isinstance(codec, KMeansCodec):
        return CpuKernel(codec.name, "scalar.hpp", f"Scalar<Table::row_levels, {codec.bits}, 0, false, 0, 1>")
    if isinstance(codec, AdditiveCodec):
        parameters = f"{codec.num_codebooks}, {codec.codebook_bits}, {codec.dim}"
        return CpuKernel(codec.name.removesuffix("-shared"), "vectors.hpp", f"Additive<{parameters}>")
    if isinstance(codec, LatticeCodec):
        return CpuKernel(codec.name, "vectors.hpp", f"Lattice<{codec.bits}>")
    if isinstance(codec, DenseCodec):
        return CpuKernel(codec.name, "vectors.hpp", f"Dense<Float::{codec.dtype}>")
    return None


def _scalar(codec: ScalarCodec) -> CpuKernel:
    integers = codec.table in ("int", "uint")
    double = codec.double_quant
    table, zeros = "integers" if integers else "levels", str(codec.table == "uint").lower()
    scales = f"{double.bits}, {double.block}" if double else "0, 1"
    name = codec.name if integers else codec.name.replace(codec.table, "levels", 1)  # the levels themselves are data
    return CpuKernel(name, "scalar.hpp", f"Scalar<Table::{table}, {codec.bits}, {codec.group_size}, {zeros}, {scales}>")


def emit(kernel: CpuKernel) -> str:
    """C++ source of `kernel`, the same text for the same kernel on every machine."""
    return _TEMPLATE.format(label=kernel.label, header=kernel.header, codec=kernel.codec)


@dataclass(frozen=True, slots=True)
class CpuFunctions:
    """The built kernel: addresses of its tables of functions, and its entry points."""

    library: ctypes.CDLL

    def kernels(self, rotated: bool) -> int:
        """Address of the `Kernels` of linear.hpp; those of a rotated matrix cannot give single rows."""
        return int(self.library.reallm_kernels(int(rotated)))

    def behind(self, cols: int) -> int:
        """Floats behind the prepared x of `cols` columns."""
        return int(self.library.reallm_behind(cols))

    @property
    def layout(self) -> int:
        """What those floats are: kernels with equal layouts read each other's."""
        return int(self.library.reallm_layout())

    @property
    def linear(self) -> Callable[[int, int, int, int, int, int], int]:
        """y = W_hat x: operand, x, y (addresses), kind, batch, threads -> 0, or 1 without memory. No layer of Python in
        between, which would cost a small product a tenth of its time."""
        found: Callable[[int, int, int, int, int, int], int] = self.library.reallm_linear
        return found

    def rows(self, operand: int, index: int, count: int, out: int, kind: int) -> int:
        """Rows of W_hat by addresses; 0, or 1 without memory."""
        return int(self.library.reallm_rows(operand, index, count, out, kind))


@cache
def functions(kernel: CpuKernel, abi_bytes: int) -> CpuFunctions | None:
    """The functions of `kernel`, built if need be, or None where it cannot be built (`native` has said why).

    `abi_bytes` is the caller's size of an Operand. Raises RuntimeError if the source's is another.
    """
    library = generated(kernel.name, emit(kernel))
    if library is None:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.reallm_abi_bytes.restype = library.reallm_behind.restype = library.reallm_layout.restype = number
    library.reallm_behind.argtypes = (number,)
    library.reallm_kernels.restype = pointer
    library.reallm_linear.argtypes = (pointer, pointer, pointer, ctypes.c_int, number, ctypes.c_int)
    library.reallm_rows.argtypes = (pointer, pointer, number, pointer, ctypes.c_int)
    if (found := library.reallm_abi_bytes()) != abi_bytes:
        raise RuntimeError(f"linear.hpp's Operand has {found} bytes, its mirror in Python {abi_bytes}")
    return CpuFunctions(library)
