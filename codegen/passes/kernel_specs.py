"""Makes the specifications of a matrix's kernels from its operations: projection, preparation, product and finish.

The projection t = R x is a separate kernel. If it were part of the GEMV, each of the N / BLOCK_N instances would read
R, in total N / BLOCK_N * rank * K * bytes: about 14 MB for N = 576, K = 1536, rank 16 in fp16 and BLOCK_N = 2, against
0.3 MB of 3-bit codes. A separate kernel reads R once (49 kB) and writes M * rank floats, at the cost of one launch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache

from reallm.codegen.ir.lower import decode_operations
from reallm.codegen.ir.operations import (
    AddBias,
    AddLowRank,
    AddSparse,
    Keep,
    Operation,
    Prepare,
    Project,
    Store,
    Trellis,
    Unpack,
    Unrotate,
)
from reallm.codegen.ir.program import GEMM_BATCH, SPAN, KernelSpec, MatrixProgram, Tile
from reallm.codegen.triton.prepare_finish import CHUNK, pieces_at_once
from reallm.codegen.triton.rotation_factors import rotation_factors
from reallm.codegen.triton.scalar_spans import takes_span
from reallm.codegen.triton.trellis import kernel_widths, nominal_width
from reallm.kernels.formats.codecs import TILE, TrellisCodec
from reallm.kernels.formats.formats import Format

from .choose_tiles import PREFILL_TILE

DENSE_TILE = Tile(16, 128, 4)
"""Tile of a kernel that writes decoded values, except those of a trellis."""
PROJECT_TILE = Tile(1, 1024, 4)
PROJECT_CHUNK = 8
"""Columns of a factor R that a thread loads as one vector."""
WARP_ENTRIES = 256
"""Number of entries that a warp prepares or finishes if there is no rotation."""
OWN_ENTRIES = 64
"""Number of entries of a rotated vector that an instance computes; if a piece is larger, it computes one piece."""
THREAD_ENTRIES = 16
"""Number of entries that a thread holds in its registers while it computes a rotation."""
MAX_WARPS = 16
"""Maximum number of warps of an instance that computes a rotation."""
PREPARED_ENTRIES, FINISHED_ENTRIES = 16384, 8192
"""Maximum numbers of entries that an instance holds at once while it computes a rotation, in `prepare` and in `finish`.
The number for `finish` is smaller because every entry there is first added up from partial sums."""


def product_kernel(matrix: MatrixProgram, operations: tuple[Operation, ...], tile: Tile) -> KernelSpec:
    """The kernel that decodes and multiplies; for a matrix without transforms it also finishes the product."""
    batch = GEMM_BATCH if matrix.prefill else 1
    if isinstance(trellis := operations[0], Trellis):
        widths = nominal_widths([matrix.format], trellis)
        label = f"tq-l{trellis.state_bits}"
        return KernelSpec(label, operations, tile, aligned=True, even=True, batch=batch, widths=widths)
    unpack = next(operation for operation in operations if isinstance(operation, Unpack))
    complete = isinstance(operations[-1], Store)
    if complete:
        fmt = replace(matrix.format, feedback="", clipping=False, plain_svd=False)
    else:
        fmt = Format(matrix.format.codec)
    label = fmt.name.replace("-shared", "") + ("" if complete else "-part")
    label += "-bias" if any(isinstance(operation, AddBias) for operation in operations) else ""
    spans = takes_span(operations, matrix.cols) and tile.block_k >= SPAN and not matrix.prefill
    aligned = matrix.cols % unpack.chunk_width == 0
    even = matrix.cols % tile.block_k == 0
    return KernelSpec(label, operations, tile, aligned, even, batch, span=SPAN if spans else 0)


def nominal_widths(formats: Iterable[Format], trellis: Trellis) -> tuple[int, ...]:
    """The widths for which kernels of these formats are compiled as long as the widths of the blocks are unknown."""
    rates = {nominal_width(fmt.codec) for fmt in formats if isinstance(fmt.codec, TrellisCodec)}
    return kernel_widths(rates, trellis.state_bits)


@cache
def dense_kernel(fmt: Format, cols: int) -> KernelSpec:
    """The kernel that writes the decoded values of a matrix with `cols` columns; it ignores outliers and factors."""
    operations = (*decode_operations(fmt.codec), Keep())
    if isinstance(trellis := operations[0], Trellis):
        widths = nominal_widths([fmt], trellis)
        return KernelSpec(f"tq-l{trellis.state_bits}", operations, PREFILL_TILE, cols % TILE == 0, True, widths=widths)
    unpack = next(operation for operation in operations if isinstance(operation, Unpack))
    label, tile = Format(fmt.codec).name.replace("-shared", ""), DENSE_TILE
    return KernelSpec(label, operations, tile, cols % unpack.chunk_width == 0, cols % tile.block_k == 0)


def project_kernel(matrix: MatrixProgram, project: Project) -> KernelSpec:
    """The kernel that computes t = R x."""
    return KernelSpec(project.dtype, (project,), PROJECT_TILE, matrix.cols % PROJECT_CHUNK == 0, even=False)


def prepare_kernel(matrix: MatrixProgram, prepare: Prepare) -> KernelSpec:
    """The kernel that computes x'."""
    label = prepare.label + ("-lifted" if prepare.lift else "")
    return _piece_kernel(label, (prepare,), matrix.cols, prepare.rotated, PREPARED_ENTRIES)


def finish_kernel(matrix: MatrixProgram, operations: tuple[Operation, ...]) -> KernelSpec:
    """The kernel that turns the sums of a transformed product into y."""
    parts = [_finish_label(operation) for operation in operations]
    rotated = any(isinstance(operation, Unrotate) and operation.rotated for operation in operations)
    return _piece_kernel("-".join(part for part in parts if part), operations, matrix.rows, rotated, FINISHED_ENTRIES)


def _finish_label(operation: Operation) -> str:
    match operation:
        case Unrotate(rotated):
            return "rot" if rotated else "plain"
        case AddSparse():
            return "o"
        case AddLowRank(rank, dtype):
            return f"r{rank}{'' if dtype == 'f16' else dtype}"
        case AddBias():
            return "bias"
    return ""


def _piece_kernel(label: str, operations: tuple[Operation, ...], order: int, rotated: bool, entries: int) -> KernelSpec:
    """A kernel that computes a vector of `order` entries: an instance computes pieces if `rotated`, else one chunk."""
    if not rotated:
        return KernelSpec(label, operations, Tile(1, CHUNK, CHUNK // WARP_ENTRIES), aligned=True, even=True)
    base, size = rotation_factors(order)
    computed = min(max(1, OWN_ENTRIES // size), 1 << (len(base) - 1).bit_length())
    pieces = pieces_at_once(computed, len(base), size, entries)
    warps = max(1, min(MAX_WARPS, computed * pieces * size // THREAD_ENTRIES // 32))
    tile, even = Tile(computed, size, warps), len(base) <= pieces
    return KernelSpec(label, operations, tile, aligned=True, even=even, pieces=pieces)
