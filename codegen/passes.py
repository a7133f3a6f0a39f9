"""The passes: each takes a program and gives a better one; the verifier runs before the first and after every one.

1. hoist_row_scales  a scale shared by a whole row multiplies the finished sum, not every weight.
2. choose_tiles      BLOCK_N, BLOCK_K and num_warps for each matrix, by the costs below.
3. share_kernels     the operations are cut into kernels; matrices with equal specifications share one.

The projection t = R x is a kernel of its own. Computed inside the GEMV it would be read by each of the N / BLOCK_N
instances: N / BLOCK_N * rank * K * bytes, for N = 576, K = 1536, r16 in fp16 and BLOCK_N = 2 some 14 MB against the
0.3 MB of 3-bit codes. Its own kernel reads R once (49 kB) and hands over M * rank floats, at the price of one launch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain

from .operations import AddBias, Dot, GroupScale, Operation, Project, RowScale, Unpack
from .program import KernelSpec, MatrixProgram, Program, Tile, chunk_width, verify_program

BLOCKS_N = (8, 4, 2, 1)
"""With more rows and MAX_BATCH rows of x the sums of a thread would not fit its registers."""
BLOCKS_K = (64, 128, 256, 512)
WANTED_INSTANCES = 256
"""Two for each of the 108 (A100) to 132 (H100) multiprocessors, about."""
THREAD_WEIGHTS = 16
"""Of a tile, in each thread: with fewer, threads repeat each other's work; with more, another warp is taken."""
MAX_WARPS = 8
TURN_INSTRUCTIONS, WEIGHT_INSTRUCTIONS = 40, 9
"""Of one turn of the loop over K: for each warp, and for each weight of a thread (4-bit INT g64 in sm_80 code)."""
PROJECT_TILE = Tile(1, 1024, 4)
PROJECT_CHUNK = 8


def _map(program: Program, change: Callable[[MatrixProgram], MatrixProgram]) -> Program:
    return Program(tuple(change(matrix) for matrix in program.matrices))


def hoist_row_scales(program: Program) -> Program:
    """(values * s_n) . x = s_n * (values . x) when s_n is one scale for the row."""

    def move(operation: Operation, scale: GroupScale) -> tuple[Operation, ...]:
        if operation is scale:
            return ()
        return (operation, RowScale(scale.double_quant)) if isinstance(operation, Dot) else (operation,)

    def hoist(matrix: MatrixProgram) -> MatrixProgram:
        scale = next((op for op in matrix.operations if isinstance(op, GroupScale)), None)
        if scale is None or scale.group_size:
            return matrix
        moved = chain.from_iterable(move(operation, scale) for operation in matrix.operations)
        return replace(matrix, operations=tuple(moved))

    return _map(program, hoist)


def _warps(block_n: int, block_k: int) -> int:
    return max(1, min(MAX_WARPS, block_n * block_k // (32 * THREAD_WEIGHTS)))


def _instructions(block_n: int, block_k: int, cols: int) -> int:
    """Instructions of one instance over all its warps: what BLOCK_K trades, long turns against padded columns."""
    warps = _warps(block_n, block_k)
    weights = max(THREAD_WEIGHTS, block_n * block_k // (32 * warps))
    return -(-cols // block_k) * warps * (TURN_INSTRUCTIONS + WEIGHT_INSTRUCTIONS * weights)


def tile_for(rows: int, cols: int) -> Tile:
    """The tile for W[rows, cols].

    BLOCK_N is the largest that still gives WANTED_INSTANCES (1 when none does), BLOCK_K the one of fewest instructions,
    the larger where two are equal, and num_warps leaves each thread about THREAD_WEIGHTS weights.
    """
    block_n = next((block for block in BLOCKS_N if -(-rows // block) >= WANTED_INSTANCES), 1)
    block_k = min(BLOCKS_K, key=lambda block: (_instructions(block_n, block, cols), -block))
    return Tile(block_n, block_k, _warps(block_n, block_k))


def choose_tiles(program: Program) -> Program:
    """Give every matrix that has none its tile."""
    return _map(program, lambda matrix: replace(matrix, tile=matrix.tile or tile_for(matrix.rows, matrix.cols)))


def _gemv_kernel(matrix: MatrixProgram, operations: tuple[Operation, ...], tile: Tile) -> KernelSpec:
    unpack = next(operation for operation in operations if isinstance(operation, Unpack))
    label = replace(matrix.format, feedback="", clipping=False, plain_svd=False).name.replace("-shared", "")
    label += "-bias" if any(isinstance(operation, AddBias) for operation in operations) else ""
    aligned = matrix.cols % chunk_width(unpack) == 0
    return KernelSpec(label, operations, tile, aligned, even=matrix.cols % tile.block_k == 0)


def _project_kernel(matrix: MatrixProgram, project: Project) -> KernelSpec:
    return KernelSpec(project.dtype, (project,), PROJECT_TILE, matrix.cols % PROJECT_CHUNK == 0, even=False)


def share_kernels(program: Program) -> Program:
    """Cut each matrix's operations into kernels; equal specifications are one kernel from here on."""

    def cut(matrix: MatrixProgram) -> MatrixProgram:
        tile = matrix.tile or tile_for(matrix.rows, matrix.cols)
        projects = tuple(op for op in matrix.operations if isinstance(op, Project))
        rest = matrix.operations[len(projects) :]
        first = tuple(_project_kernel(matrix, project) for project in projects)
        return replace(matrix, kernels=(*first, _gemv_kernel(matrix, rest, tile)))

    return _map(program, cut)


PASSES: tuple[tuple[str, Callable[[Program], Program]], ...] = (
    ("hoist_row_scales", hoist_row_scales),
    ("choose_tiles", choose_tiles),
    ("share_kernels", share_kernels),
)


def run_passes(program: Program) -> Program:
    """All passes in order, verified before the first and after each. Raises CodegenError."""
    verify_program(program)
    for _name, transform in PASSES:
        program = transform(program)
        verify_program(program)
    return program
