"""Pass that chooses BLOCK_N, BLOCK_K and num_warps of each product, from tables of the fastest tiles on an H100."""

from __future__ import annotations

from dataclasses import replace

from reallm.codegen.ir.operations import Codebooks, Lattice, Operation, Trellis, Unpack
from reallm.codegen.ir.program import SPAN, MatrixProgram, Program, Tile
from reallm.codegen.triton.scalar_spans import takes_span

CHUNK_TILES: dict[type, Tile] = {Lattice: Tile(1, 256, 1), Codebooks: Tile(1, 512, 1), Unpack: Tile(1, 1024, 2)}
"""Tiles of products that process a row by chunks (see `Unpack.chunk_width`). Times for a 4096 x 4096 matrix on an H100:
e8p2 16 us, aq2x8 11 us, km3 13 us; torch in bf16 takes 16 us."""
WANTED_INSTANCES = 256
"""Desired number of kernel instances: about two for each of the 108 (A100) to 132 (H100) multiprocessors."""
TRELLIS_TILES = (Tile(128, 16, 8), Tile(32, 16, 16))
"""Tiles of a trellis product for matrices with at least MANY_ROWS rows (four rows of W per thread), and with fewer (one
row of W per thread); each warp has different columns. On an H100 the first takes 8.6 us and the second 9.7 us for a
4096 x 4096 matrix in 3 bits; for 1024 x 4096 they take 5.8 us and 4.8 us."""
MANY_ROWS = 2048
SPAN_ROWS = (4, 2)
"""Possible numbers of rows of W per instance of a product by spans (`triton.scalar_spans`); preferred ones first."""
SPAN_TURN = 2 * 32 * SPAN
"""Columns that a warp covers in two turns of its loop."""
PREFILL_TILE = Tile(128, 16, 4)
"""Tile of a trellis product with many rows of x: one row of W per thread."""
GEMM_TILE = Tile(64, 64, 8)
"""Tile of the other codecs with many rows of x: 16 weights per thread."""


def choose_tiles(program: Program) -> Program:
    """Choose a tile for every matrix that has none yet."""
    return program.map(lambda matrix: replace(matrix, tile=matrix.tile or product_tile(matrix)))


def product_tile(matrix: MatrixProgram) -> Tile:
    """The tile of a matrix's product."""
    if any(isinstance(operation, Trellis) for operation in matrix.operations):
        return trellis_tile(matrix.rows, matrix.prefill)
    if matrix.prefill:
        return GEMM_TILE
    if takes_span(matrix.operations, matrix.cols):
        return span_tile(matrix.rows, matrix.cols)
    return chunk_tile(matrix.operations)


def trellis_tile(rows: int, prefill: bool) -> Tile:
    """The tile of a trellis product: more rows per thread read x less often, fewer rows give more instances."""
    if prefill:
        return PREFILL_TILE
    return TRELLIS_TILES[rows < MANY_ROWS]


def span_tile(rows: int, cols: int) -> Tile:
    """The tile of a product by spans.

    All rows of an instance (see SPAN_ROWS) share each load of x; there is one warp per SPAN_TURN columns, up to 4.
    """
    block_n = next((block for block in SPAN_ROWS if rows >= WANTED_INSTANCES * block), SPAN_ROWS[-1])
    warps = next((count for count in (4, 2) if cols >= count * SPAN_TURN), 1)
    return Tile(block_n, 32 * SPAN * warps, warps)


def chunk_tile(operations: tuple[Operation, ...]) -> Tile:
    """The tile of a product by chunks: one row of W, and the number of columns that was best for its codec."""
    kinds = {type(operation) for operation in operations}
    return next((tile for kind, tile in CHUNK_TILES.items() if kind in kinds), CHUNK_TILES[Unpack])
