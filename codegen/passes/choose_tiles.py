"""Pass: BLOCK_N, BLOCK_K and num_warps of each matrix's product, from tables of what was fastest on an H100."""

from __future__ import annotations

from dataclasses import replace

from reallm.codegen.ir.operations import Codebooks, Lattice, Operation, Trellis, Unpack
from reallm.codegen.ir.program import SPAN, MatrixProgram, Program, Tile
from reallm.codegen.triton.scalar_spans import takes_span

CHUNK_TILES: dict[type, Tile] = {Lattice: Tile(1, 256, 1), Codebooks: Tile(1, 512, 1), Unpack: Tile(1, 1024, 2)}
"""Tiles of products whose rows are chunks. Times for 4096 x 4096 on an H100: e8p2 16 us, aq2x8 11, km3 13; torch in
bf16 16."""
WANTED_INSTANCES = 256
"""About two for each of the 108 (A100) to 132 (H100) multiprocessors."""
TRELLIS_TILES = (Tile(128, 16, 8), Tile(32, 16, 16))
"""Tiles of a trellis product: a thread has four rows of W in a matrix of MANY_ROWS or more, otherwise one; each warp
has its own columns. On an H100 the first takes 8.6 us for 4096 x 4096 in 3 bits, the second 9.7; for 1024 x 4096 they
take 5.8 and 4.8."""
MANY_ROWS = 2048
SPAN_ROWS = (4, 2)
"""Rows of W that an instance of a product by spans may have, preferred first."""
SPAN_TURN = 2 * 32 * SPAN
"""Columns that a warp covers in two turns of its loop."""
PREFILL_TILE = Tile(128, 16, 4)
"""Tile of a trellis product with many rows of x: one row of W per thread."""
GEMM_TILE = Tile(64, 64, 8)
"""Tile of the other codecs with many rows of x: 16 weights per thread."""


def choose_tiles(program: Program) -> Program:
    """Give every matrix that has no tile one."""
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
    """The tile of a trellis product: more rows in a thread read x less often, fewer rows make more instances."""
    if prefill:
        return PREFILL_TILE
    return TRELLIS_TILES[rows < MANY_ROWS]


def span_tile(rows: int, cols: int) -> Tile:
    """The tile of a product by spans: SPAN_ROWS rows share each x; one warp for each SPAN_TURN columns."""
    block_n = next((block for block in SPAN_ROWS if rows >= WANTED_INSTANCES * block), SPAN_ROWS[-1])
    warps = next((count for count in (4, 2) if cols >= count * SPAN_TURN), 1)
    return Tile(block_n, 32 * SPAN * warps, warps)


def chunk_tile(operations: tuple[Operation, ...]) -> Tile:
    """The tile of a product by chunks: one row of W, and the number of columns that was best for its codec."""
    kinds = {type(operation) for operation in operations}
    return next((tile for kind, tile in CHUNK_TILES.items() if kind in kinds), CHUNK_TILES[Unpack])
