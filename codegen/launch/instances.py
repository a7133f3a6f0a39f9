"""How a product is divided among kernel instances: the rows of x per instance, and the splits of the columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from reallm.codegen.ir.operations import Trellis
from reallm.codegen.ir.program import KernelSpec
from reallm.codegen.triton.emit import pointers
from reallm.codegen.triton.trellis import WARP, kernel_widths
from reallm.kernels.formats.codecs import TILE

from .bindings import ProductCall

MAX_BATCH = 4
"""Maximum number of rows of x per instance of a GEMV; for more rows there are more instances, or a GEMM."""
GEMM_BATCHES = (16, 32, 64)
"""Possible numbers of rows of x per instance of a GEMM."""
WANTED_WARPS = 2048
"""Maximum number of warps for which the columns of a trellis product are split: about 15 per multiprocessor."""
SPLITS = (8, 4, 2, 1)
"""Possible numbers of instances among which the columns of a product are divided; preferred ones first."""


def for_calls(spec: KernelSpec, calls: Sequence[ProductCall], many: bool) -> KernelSpec:
    """`spec`, adapted to the rows of x in `calls` and to the widths of their trellises; `many` selects a GEMM."""
    limits = GEMM_BATCHES if many else range(1, MAX_BATCH + 1)
    batch = next((limit for limit in limits if limit >= calls[0].count), limits[-1])
    widths = {width for call in calls for width in call.widths}
    if isinstance(trellis := spec.operations[0], Trellis):
        spec = replace(spec, widths=kernel_widths(widths, trellis.state_bits))
    if spec.function == "dense":
        return spec
    return with_batch(spec, batch)


def with_batch(spec: KernelSpec, batch: int) -> KernelSpec:
    """`spec`, changed to `batch` rows of x per instance.

    A trellis GEMV gets fewer rows of W per instance in return, so that a thread has as many sums as with one row of x;
    its registers cannot hold more.
    """
    tile = spec.tile
    if spec.widths and spec.function == "gemv":
        tile = replace(tile, block_n=max(WARP, tile.block_n // (1 << (batch - 1).bit_length())))
    return replace(spec, batch=batch, tile=tile)


def splits_for(spec: KernelSpec, rows: int, cols: int, count: int) -> int:
    """The number of instances among which the columns of a product with `count` rows of x are divided.

    It is 1 for kernels other than trellis products, because no later kernel adds up their partial sums.
    """
    if not spec.widths:
        return 1
    instances = -(-rows // spec.tile.block_n) * -(-count // spec.batch)
    warps = spec.tile.num_warps
    blocks_at_once = warps if spec.function == "gemv" else 1
    max_splits = min(WANTED_WARPS // (instances * warps), -(-cols // TILE) // blocks_at_once)
    return next((splits for splits in SPLITS if splits <= max_splits), 1)


def vector_instances(spec: KernelSpec, order: int) -> tuple[int, int]:
    """(number of instances of `spec` for a vector of `order` entries, number of pieces of its rotation or 1)."""
    if any(name.startswith("base") for name, _ in pointers(spec)):
        pieces = order // spec.tile.block_k
        return -(-pieces // spec.tile.block_n), pieces
    padded = -(-order // TILE) * TILE if spec.function == "prepare" else order
    return -(-padded // spec.tile.block_k), 1
