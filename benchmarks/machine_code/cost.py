"""The static cost of a product: instructions and bytes per weight, from its machine code and its format.

    instructions   those that a thread runs, loops included, times the threads of a kernel instance, divided by the
                   number of weights that the instance multiplies
    bytes          the stored fields and x, each read once, and the sums that all instances write

Latency, occupancy and caches are not modelled.
"""

from __future__ import annotations

from dataclasses import dataclass

from reallm.codegen.ir.operations import CodegenError
from reallm.codegen.ir.program import KernelSpec
from reallm.kernels.formats.codecs import TILE, TrellisCodec
from reallm.kernels.formats.formats import Format

from .sass import Code

WARP_THREADS = 32


@dataclass(frozen=True)
class Cost:
    """The cost of multiplying W[rows, cols] with one row of x by one kernel."""

    instructions_per_weight: float
    packed_bytes: int
    """Bytes of the stored fields that the kernel reads."""
    moved_bytes: int
    """Total bytes of the stored fields, of x, and of the sums that the kernel writes."""

    @property
    def moved_over_packed(self) -> float:
        return self.moved_bytes / self.packed_bytes


def product_cost(
    spec: KernelSpec, code: Code, fmt: Format, rows: int, cols: int, splits: int = 1, width: int = 4
) -> Cost:
    """The cost of the kernel `spec`, whose machine code is `code`, for a matrix [rows, cols] stored as `fmt`.

    The columns of a trellis are divided among `splits` instances, and all its blocks are assumed to have the width
    `width`. Raises CodegenError for a kernel whose numbers of loop iterations are not known.
    """
    threads = WARP_THREADS * spec.tile.num_warps
    if spec.widths:
        blocks = -(-cols // TILE) / splits
        turns = [blocks / spec.tile.num_warps if loop_width == width else 0.0 for loop_width in spec.widths]
        weights = spec.tile.block_n * blocks * TILE
    elif spec.span:
        turns = [-(-cols // spec.tile.block_k)]
        weights = float(spec.tile.block_n * cols)
    else:
        raise CodegenError(f"loop counts of {spec.name} are unknown; expected a trellis product or a product by spans")
    packed = sum(field.nbytes for field in fmt.fields(rows, cols))
    if isinstance(fmt.codec, TrellisCodec):
        packed = fmt.fields(rows, cols)[0].nbytes + 2 * -(-cols // TILE)
    parts = 4 * rows * splits if spec.widths else 2 * rows
    x_bytes = cols * (4 if spec.widths else 2)
    return Cost(code.count(turns) * threads / weights, packed, packed + x_bytes + parts)
