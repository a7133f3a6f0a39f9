"""How a product is shared out among kernel instances: rows of x an instance takes, and splits of the columns."""

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
"""Rows of x that one instance of a GEMV takes at most; further rows become further instances, or a GEMM."""
GEMM_BATCHES = (16, 32, 64)
"""Rows of x that an instance of a GEMM may take."""
WANTED_WARPS = 2048
"""Warps of a trellis product to aim for: about fifteen for each multiprocessor."""
SPLITS = (8, 4, 2, 1)
"""Numbers of instances that may share out the columns of a product, preferred first."""


def for_calls(spec: KernelSpec, calls: Sequence[ProductCall], many: bool) -> KernelSpec:
    """The specification for the calls' rows of x and the widths of their trellises; `many` selects a GEMM."""
    limits = GEMM_BATCHES if many else range(1, MAX_BATCH + 1)
    batch = next((limit for limit in limits if limit >= calls[0].count), limits[-1])
    widths = {width for call in calls for width in call.widths}
    if isinstance(trellis := spec.operations[0], Trellis):
        spec = replace(spec, widths=kernel_widths(widths, trellis.state_bits))
    if spec.function == "dense":
        return spec
    return with_batch(spec, batch)


def with_batch(spec: KernelSpec, batch: int) -> KernelSpec:
    """The specification for `batch` rows of x an instance.

    A trellis tile gets fewer rows of W in return, so that a thread has as many sums as with one row of x; its registers
    hold no more.
    """
    tile = spec.tile
    if spec.widths and spec.function == "gemv":
        tile = replace(tile, block_n=max(WARP, tile.block_n // (1 << (batch - 1).bit_length())))
    return replace(spec, batch=batch, tile=tile)


def splits_for(spec: KernelSpec, rows: int, cols: int, count: int) -> int:
    """The number of instances that share out the columns of a product with `count` rows of x.

    It is 1 for a kernel whose parts nothing adds up.
    """
    if not spec.widths:
        return 1
    instances = -(-rows // spec.tile.block_n) * -(-count // spec.batch)
    warps = spec.tile.num_warps
    blocks_at_once = warps if spec.function == "gemv" else 1
    max_splits = min(WANTED_WARPS // (instances * warps), -(-cols // TILE) // blocks_at_once)
    return next((splits for splits in SPLITS if splits <= max_splits), 1)


def vector_instances(spec: KernelSpec, order: int) -> tuple[int, int]:
    """(instances that share out a vector of `order` entries, pieces of its rotation)."""
    if any(name.startswith("base") for name, _ in pointers(spec)):
        pieces = order // spec.tile.block_k
        return -(-pieces // spec.tile.block_n), pieces
    padded = -(-order // TILE) * TILE if spec.function == "prepare" else order
    return -(-padded // spec.tile.block_k), 1
