"""The passes: each takes a program and gives a better one; the verifier runs before the first and after every one.

1. hoist_row_scales  a scale shared by a whole row multiplies the finished sum, not every weight.
2. share_inputs      matrices that share an input (q, k, v; gate, up) and its rotation have it prepared once.
3. choose_tiles      BLOCK_N, BLOCK_K and num_warps for each matrix, by what was fastest on an H100.
4. share_kernels     the operations are cut into kernels; matrices with equal specifications share one.
5. group_products    matrices that share an input and the operations of their product are multiplied by one launch.

The projection t = R x is a kernel of its own. Computed inside the GEMV it would be read by each of the N / BLOCK_N
instances: N / BLOCK_N * rank * K * bytes, for N = 576, K = 1536, r16 in fp16 and BLOCK_N = 2 some 14 MB against the
0.3 MB of 3-bit codes. Its own kernel reads R once (49 kB) and hands over M * rank floats, at the price of one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from itertools import chain

from reallm.codegen.ir.dataflow import shared_inputs
from reallm.codegen.ir.operations import (
    AddBias,
    AddLowRank,
    AddSparse,
    Codebooks,
    Dot,
    GroupScale,
    Keep,
    Lattice,
    Operation,
    Prepare,
    Project,
    Reuse,
    RowScale,
    Store,
    Trellis,
    Unpack,
    Unrotate,
)
from reallm.codegen.ir.program import (
    GEMM_BATCH,
    SPAN,
    Group,
    KernelSpec,
    MatrixProgram,
    Program,
    Tile,
    chunk_width,
    decode_operations,
    prepared_by,
    verify_program,
)
from reallm.codegen.triton.prepare_finish import CHUNK, together
from reallm.codegen.triton.rotation_factors import rotation_factors
from reallm.codegen.triton.scalar_spans import takes_span
from reallm.codegen.triton.trellis import kernel_widths, nominal_width
from reallm.kernels.formats.codecs import TILE, TrellisCodec
from reallm.kernels.formats.formats import Format

CHUNK_TILES: dict[type, Tile] = {Lattice: Tile(1, 256, 1), Codebooks: Tile(1, 512, 1), Unpack: Tile(1, 1024, 2)}
"""Of products whose rows are chunks: of 4096 x 4096 on an H100, e8p2 16 us, aq2x8 11, km3 13; torch in bf16 16."""
WANTED_INSTANCES = 256
"""Two for each of the 108 (A100) to 132 (H100) multiprocessors, about."""
TRELLIS_TILES = (Tile(128, 16, 8), Tile(32, 16, 16))
"""Of a trellis product: four rows of W a thread where there are MANY_ROWS, else one; warps have columns of their own.
On an H100 the first takes 8.6 us for 4096 x 4096 in 3 bits, the second 9.7; for 1024 x 4096 they take 5.8 and 4.8."""
MANY_ROWS = 2048
SPAN_ROWS = (4, 2)
"""Rows of W of an instance of a product by spans."""
SPAN_TURN = 2 * 32 * SPAN
"""Columns of two turns of a warp."""
PREFILL_TILE = Tile(128, 16, 4)
"""Of a trellis and many rows of x: one row of W a thread."""
DENSE_TILE = Tile(16, 128, 4)
"""Of values that are kept."""
GEMM_TILE = Tile(64, 64, 8)
"""Of the other codecs and many rows of x: 16 weights a thread."""
WARP_ENTRIES = 256
"""Of a vector that is finished without a rotation, for each warp."""
OWN_ENTRIES = 64
"""Of a rotated vector that an instance makes, where its pieces are smaller."""
THREAD_ENTRIES = 16
"""That a thread of such an instance has in its registers."""
MOST_WARPS = 16
"""Of such an instance."""
PREPARED_ENTRIES, FINISHED_ENTRIES = 16384, 8192
"""Of the pieces that one mixes, at once; the sums of a product come in several parts."""
PROJECT_TILE = Tile(1, 1024, 4)
PROJECT_CHUNK = 8


def _map(program: Program, change: Callable[[MatrixProgram], MatrixProgram]) -> Program:
    return replace(program, matrices=tuple(change(matrix) for matrix in program.matrices))


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


def share_inputs(program: Program) -> Program:
    """The first matrix of each input prepares it for those behind it; a permutation or scales are a matrix's own."""
    inputs = shared_inputs(matrix.name for matrix in program.matrices)
    leaders: dict[tuple[str, Prepare], str] = {}

    def reuse(matrix: MatrixProgram, operation: Operation) -> Operation:
        if not isinstance(operation, Prepare) or operation.reads:
            return operation
        leader = leaders.setdefault((inputs[matrix.name], operation), matrix.name)
        return operation if leader == matrix.name else Reuse(leader, operation.rotated)

    return _map(program, lambda m: replace(m, operations=tuple(reuse(m, operation) for operation in m.operations)))


def tile_for(operations: tuple[Operation, ...]) -> Tile:
    """The tile of a product by chunks: one row of W, and the columns that were best on an H100 for its codec."""
    kinds = {type(operation) for operation in operations}
    return next((tile for kind, tile in CHUNK_TILES.items() if kind in kinds), CHUNK_TILES[Unpack])


def trellis_tile(rows: int, prefill: bool) -> Tile:
    """The tile of a trellis product: threads with more rows read x less often, with fewer there are more instances."""
    if prefill:
        return PREFILL_TILE
    return TRELLIS_TILES[rows < MANY_ROWS]


def _own_tile(matrix: MatrixProgram) -> Tile:
    if any(isinstance(operation, Trellis) for operation in matrix.operations):
        return trellis_tile(matrix.rows, matrix.prefill)
    if matrix.prefill:
        return GEMM_TILE
    if takes_span(matrix.operations, matrix.cols):
        return span_tile(matrix.rows, matrix.cols)
    return tile_for(matrix.operations)


def span_tile(rows: int, cols: int) -> Tile:
    """The tile of a product by spans: SPAN_ROWS rows share each x; one warp for each SPAN_TURN columns."""
    block_n = next((block for block in SPAN_ROWS if rows >= WANTED_INSTANCES * block), SPAN_ROWS[-1])
    warps = next((count for count in (4, 2) if cols >= count * SPAN_TURN), 1)
    return Tile(block_n, 32 * SPAN * warps, warps)


def choose_tiles(program: Program) -> Program:
    """Give every matrix that has none its tile."""
    return _map(program, lambda matrix: replace(matrix, tile=matrix.tile or _own_tile(matrix)))


def _nominal_widths(formats: Iterable[Format], trellis: Trellis) -> tuple[int, ...]:
    """Widths that kernels of these formats have before those of their blocks are known."""
    rates = {nominal_width(fmt.codec) for fmt in formats if isinstance(fmt.codec, TrellisCodec)}
    return kernel_widths(rates, trellis.state_bits)


def _core_kernel(matrix: MatrixProgram, operations: tuple[Operation, ...], tile: Tile) -> KernelSpec:
    """The kernel that decodes and multiplies; it also finishes where nothing is transformed."""
    batch = GEMM_BATCH if matrix.prefill else 1
    if isinstance(trellis := operations[0], Trellis):
        widths = _nominal_widths([matrix.format], trellis)
        label = f"tq-l{trellis.state_bits}"
        return KernelSpec(label, operations, tile, aligned=True, even=True, batch=batch, widths=widths)
    unpack = next(operation for operation in operations if isinstance(operation, Unpack))
    whole = isinstance(operations[-1], Store)
    fmt = replace(matrix.format, feedback="", clipping=False, plain_svd=False) if whole else Format(matrix.format.codec)
    label = fmt.name.replace("-shared", "") + ("" if whole else "-part")
    label += "-bias" if any(isinstance(operation, AddBias) for operation in operations) else ""
    spans = takes_span(operations, matrix.cols) and tile.block_k >= SPAN and not matrix.prefill
    aligned = matrix.cols % chunk_width(unpack) == 0
    even = matrix.cols % tile.block_k == 0
    return KernelSpec(label, operations, tile, aligned, even, batch, span=SPAN if spans else 0)


@cache
def dense_kernel(fmt: Format, cols: int) -> KernelSpec:
    """The kernel that writes the values of a matrix of so many columns, without what is added to its product."""
    operations = (*decode_operations(fmt.codec), Keep())
    if isinstance(trellis := operations[0], Trellis):
        widths = _nominal_widths([fmt], trellis)
        return KernelSpec(f"tq-l{trellis.state_bits}", operations, PREFILL_TILE, cols % TILE == 0, True, widths=widths)
    unpack = next(operation for operation in operations if isinstance(operation, Unpack))
    label, tile = Format(fmt.codec).name.replace("-shared", ""), DENSE_TILE
    return KernelSpec(label, operations, tile, cols % chunk_width(unpack) == 0, cols % tile.block_k == 0)


def _project_kernel(matrix: MatrixProgram, project: Project) -> KernelSpec:
    return KernelSpec(project.dtype, (project,), PROJECT_TILE, matrix.cols % PROJECT_CHUNK == 0, even=False)


def _piece_kernel(label: str, operations: tuple[Operation, ...], order: int, rotated: bool, entries: int) -> KernelSpec:
    """A kernel whose instances make pieces of a rotated vector of `order` entries, or a chunk of one that is not."""
    if not rotated:
        return KernelSpec(label, operations, Tile(1, CHUNK, CHUNK // WARP_ENTRIES), aligned=True, even=True)
    base, size = rotation_factors(order)
    own = min(max(1, OWN_ENTRIES // size), 1 << (len(base) - 1).bit_length())
    pieces = together(own, len(base), size, entries)
    warps = max(1, min(MOST_WARPS, own * pieces * size // THREAD_ENTRIES // 32))
    tile, whole = Tile(own, size, warps), len(base) <= pieces
    return KernelSpec(label, operations, tile, aligned=True, even=whole, pieces=pieces)


def _prepare_kernel(matrix: MatrixProgram, prepare: Prepare) -> KernelSpec:
    label = prepare.label + ("-lifted" if prepare.lift else "")
    return _piece_kernel(label, (prepare,), matrix.cols, prepare.rotated, PREPARED_ENTRIES)


def _finish_kernel(matrix: MatrixProgram, operations: tuple[Operation, ...]) -> KernelSpec:
    parts = [_finish_part(operation) for operation in operations]
    rotated = any(isinstance(operation, Unrotate) and operation.rotated for operation in operations)
    return _piece_kernel("-".join(part for part in parts if part), operations, matrix.rows, rotated, FINISHED_ENTRIES)


def _finish_part(operation: Operation) -> str:
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


def cut(matrix: MatrixProgram) -> tuple[KernelSpec, ...]:
    """The kernels of a matrix in order: projection, preparation, product, what finishes it."""
    tile, kernels, rest = matrix.tile or _own_tile(matrix), [], list(matrix.operations)
    while rest and isinstance(first := rest[0], Project | Prepare | Reuse):
        if isinstance(first, Project):
            kernels.append(_project_kernel(matrix, first))
        elif isinstance(first, Prepare):
            kernels.append(_prepare_kernel(matrix, first))
        rest.pop(0)
    end = next((at for at, operation in enumerate(rest) if isinstance(operation, Unrotate)), len(rest))
    kernels.append(_core_kernel(matrix, tuple(rest[:end]), tile))
    if end < len(rest):
        kernels.append(_finish_kernel(matrix, tuple(rest[end:])))
    return tuple(kernels)


def share_kernels(program: Program) -> Program:
    """Cut each matrix's operations into kernels; equal specifications are one kernel from here on."""
    return _map(program, lambda matrix: replace(matrix, kernels=cut(matrix)))


def group_products(program: Program) -> Program:
    """Products of one input by equal operations become one launch, with the tile of a matrix of all their rows; so does
    what finishes them, where its pieces are of one size."""
    inputs = shared_inputs(matrix.name for matrix in program.matrices)
    alike: dict[tuple[object, ...], list[MatrixProgram]] = {}
    for matrix in program.matrices:
        product = _product(matrix)
        fits = inputs[matrix.name], prepared_by(matrix), matrix.cols, product.label, product.operations
        alike.setdefault(fits, []).append(matrix)
    groups = chain.from_iterable(_groups(members) for members in alike.values() if len(members) > 1)
    return replace(program, groups=tuple(groups))


def _product(matrix: MatrixProgram) -> KernelSpec:
    return next(kernel for kernel in matrix.kernels if kernel.function in ("gemv", "gemm"))


def _groups(members: list[MatrixProgram]) -> list[Group]:
    """The group of the members' products, then those of what finishes them."""
    joined = replace(members[0], rows=sum(matrix.rows for matrix in members))
    operations = _product(members[0]).operations
    kernel = _core_kernel(joined, operations, _own_tile(joined))
    if isinstance(operations[0], Trellis):
        kernel = replace(kernel, widths=_nominal_widths([matrix.format for matrix in members], operations[0]))
    groups = [Group(tuple(matrix.name for matrix in members), replace(kernel, members=len(members)))]
    finishing: dict[KernelSpec, list[tuple[str, KernelSpec]]] = {}
    for matrix in members:
        if (last := matrix.kernels[-1]).function == "finish":
            size = replace(last, tile=replace(last.tile, num_warps=1), even=True, pieces=0)
            finishing.setdefault(size, []).append((matrix.name, last))
    for found in finishing.values():
        if len(found) > 1:
            names, kernels = zip(*found, strict=True)
            most = max(kernels, key=lambda kernel: kernel.pieces)  # pieces that another matrix lacks are masked
            whole = all(kernel.even for kernel in kernels)
            groups.append(Group(names, replace(most, even=whole, members=len(names))))
    return groups


PASSES: tuple[tuple[str, Callable[[Program], Program]], ...] = (
    ("hoist_row_scales", hoist_row_scales),
    ("share_inputs", share_inputs),
    ("choose_tiles", choose_tiles),
    ("share_kernels", share_kernels),
    ("group_products", group_products),
)


def run_passes(program: Program) -> Program:
    """All passes in order, verified before the first and after each. Raises CodegenError."""
    verify_program(program)
    for _name, transform in PASSES:
        program = transform(program)
        verify_program(program)
    return program
