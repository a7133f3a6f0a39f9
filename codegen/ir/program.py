"""The program of a plan: for each compressed matrix, the typed operations that compute y = W_hat x. It can be printed.

    plan --lower--> operations --passes--> operations, tiles and shared kernels --emit--> Triton

This module holds the data types; `lower` makes a program, `passes.run_passes` improves it, and `verify` checks it
before and after every pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from reallm.kernels.formats.formats import Format

from .operations import Keep, Operation, Prepare, Project, Reuse, Unrotate

SPAN = 32
"""Columns of a span, which a thread processes at a time if the columns of a matrix are a multiple of SPAN.

The codes of a span fill whole words of every bit plane."""
GEMM_BATCH = 16
"""A kernel whose instances take this many rows of x or more is a GEMM; tensor cores need at least this many."""

Function = Literal["project", "prepare", "finish", "dense", "gemm", "gemv"]


@dataclass(frozen=True, slots=True)
class Tile:
    """The work of one kernel instance: block_n rows, block_k columns at a time, num_warps * 32 threads."""

    block_n: int
    block_k: int
    num_warps: int

    def __str__(self) -> str:
        return f"n{self.block_n}-k{self.block_k}-w{self.num_warps}"


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """Everything that a generated kernel is specialised on; equal specifications give byte-equal sources."""

    label: str
    """What the kernel computes, for its name.

    For a product it is the format, without the parts that the kernel does not depend on (feedback, shared codebooks).
    """
    operations: tuple[Operation, ...]
    tile: Tile
    aligned: bool
    """Whether a row is a whole number of chunks (see `Unpack.chunk_width`)."""
    even: bool
    """Whether a row is a whole number of tiles; in a rotation, whether an instance holds all pieces at once."""
    batch: int = 1
    """Rows of x that one instance takes; GEMM_BATCH or more make the kernel a GEMM."""
    widths: tuple[int, ...] = ()
    """Widths of blocks that a trellis kernel can decode; empty in other kernels."""
    span: int = 0
    """SPAN if the kernel works by spans (`triton.scalar_spans`), else 0."""
    pieces: int = 0
    """Number of pieces that an instance of a rotation holds at once."""
    members: int = 1
    """Number of matrices that one launch serves (`triton.group_select`)."""

    @property
    def function(self) -> Function:
        """The name of the kernel's function in its source."""
        match self.operations[0]:
            case Project():
                return "project"
            case Prepare():
                return "prepare"
            case Unrotate():
                return "finish"
        if isinstance(self.operations[-1], Keep):
            return "dense"
        return "gemm" if self.batch >= GEMM_BATCH else "gemv"

    @property
    def name(self) -> str:
        """The kernel's name, unique in a program; also the stem of its files."""
        facts = ("" if self.aligned else "-unaligned") + ("" if self.even else "-tail")
        batch = f"-m{self.batch}" if self.batch > 1 else ""
        widths = "-b" + "_".join(str(width) for width in self.widths) if self.widths else ""
        span = f"-s{self.span}" if self.span else ""
        pieces = f"-p{self.pieces}" if self.pieces else ""
        members = f"-x{self.members}" if self.members > 1 else ""
        return (
            f"{self.function}-{self.label.replace('+', '-')}-{self.tile}{facts}{span}{batch}{widths}{pieces}{members}"
        )


@dataclass(frozen=True, slots=True)
class MatrixProgram:
    """The operations of one matrix W[rows, cols], and the kernels that run them in order."""

    name: str
    rows: int
    cols: int
    format: Format
    operations: tuple[Operation, ...]
    tile: Tile | None = None
    kernels: tuple[KernelSpec, ...] = ()
    prefill: bool = False
    """Whether the program is for many rows of x, that is, a GEMM."""

    @property
    def prepared_by(self) -> str:
        """Name of the matrix that computes x' for this one: itself or an earlier one; "" if x is used unchanged."""
        for operation in self.operations:
            if isinstance(operation, Reuse):
                return operation.leader
            if isinstance(operation, Prepare):
                return self.name
        return ""

    def kernel(self, *functions: Function) -> KernelSpec | None:
        """The first kernel with one of these functions, or None."""
        return next((kernel for kernel in self.kernels if kernel.function in functions), None)

    def __str__(self) -> str:
        lines = [f"matrix {self.name} [{self.rows}, {self.cols}] {self.format.name}"]
        lines += [f"  {op.gives:<7}= {op}" for op in self.operations]
        lines += [f"  tile {self.tile}"] if self.tile else []
        lines += [f"  kernel {kernel.name}" for kernel in self.kernels]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Group:
    """Matrices with the same input for which one launch of `kernel` computes, or finishes, all products.

    `matrices` are names in the program's order. Each matrix also keeps the kernels that multiply it alone.
    """

    matrices: tuple[str, ...]
    kernel: KernelSpec

    def __str__(self) -> str:
        return f"group {' '.join(self.matrices)}\n  kernel {self.kernel.name}"


@dataclass(frozen=True, slots=True)
class Program:
    """The compressed matrices of a plan, in the plan's order, and their groups; `str` gives its printed form."""

    matrices: tuple[MatrixProgram, ...]
    groups: tuple[Group, ...] = ()

    @property
    def kernels(self) -> tuple[KernelSpec, ...]:
        """The distinct kernels, sorted by name."""
        distinct = {kernel for matrix in self.matrices for kernel in matrix.kernels}
        return tuple(sorted(distinct | {group.kernel for group in self.groups}, key=lambda kernel: kernel.name))

    def map(self, change: Callable[[MatrixProgram], MatrixProgram]) -> Program:
        """The program with `change` applied to every matrix."""
        return replace(self, matrices=tuple(change(matrix) for matrix in self.matrices))

    def __str__(self) -> str:
        return "\n".join(str(part) for part in (*self.matrices, *self.groups)) + "\n"
