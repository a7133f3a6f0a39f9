"""The static cost of a product: instructions and bytes for each weight, from its machine code and its formats.

    instructions   those of a thread in one instance, loops counted, times its threads, over the instance's weights
    bytes          fields read once, x read and sums written by every instance that does

What a multiprocessor makes of them (latency, occupancy, caches) is not modelled.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.machine_code.sass import Code
from reallm.codegen.ir.operations import CodegenError
from reallm.codegen.ir.program import KernelSpec
from reallm.kernels.formats.codecs import TILE, TrellisCodec
from reallm.kernels.formats.formats import Format

THREADS = 32


@dataclass(frozen=True)
class Cost:
    """Of a kernel for W[rows, cols] and one row of x."""

    instructions_per_weight: float
    packed_bytes: int
    """Of the fields, without padding of the file."""
    moved_bytes: int
    """Of the fields, x and what is written, in all."""

    @property
    def moved_over_packed(self) -> float:
        return self.moved_bytes / self.packed_bytes


def product_cost(
    spec: KernelSpec, code: Code, fmt: Format, rows: int, cols: int, splits: int = 1, width: int = 4
) -> Cost:
    """The cost of `spec`, compiled to `code`. All blocks of a trellis have `width`. Raises CodegenError for a kernel
    whose loops are not known."""
    threads = THREADS * spec.tile.num_warps
    if spec.widths:
        blocks = -(-cols // TILE) / splits
        turn = blocks / spec.tile.num_warps
        turns = [turn if own == width else 0.0 for own in spec.widths]
        weights = spec.tile.block_n * blocks * TILE
    elif spec.span:
        turns = [-(-cols // spec.tile.block_k)]
        weights = float(spec.tile.block_n * cols)
    else:
        raise CodegenError(f"the loops of {spec.name} are not known")
    packed = sum(field.nbytes for field in fmt.fields(rows, cols))
    if isinstance(fmt.codec, TrellisCodec):
        packed = fmt.fields(rows, cols)[0].nbytes + 2 * -(-cols // TILE)
    parts = 4 * rows * splits if spec.widths else 2 * rows
    x_bytes = cols * (4 if spec.widths else 2)
    return Cost(code.count(turns) * threads / weights, packed, packed + x_bytes + parts)
