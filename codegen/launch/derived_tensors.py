"""Small tensors that kernels read in place of some stored fields; computed once, when a matrix is first used.

index            int32, computed from the widths of a trellis; four parts, one after another: the bit pattern of a
                 float32 power of two that no scale exceeds; for each width from 0 to 16 the number of blocks of columns
                 with a smaller width; the numbers of the blocks, sorted by width; the first word of each block in this
                 order
scales           the scales of a trellis, with zeros for blocks whose width is 0
sparse_offsets   int32 [rows + 1], computed from the counts of the outliers: the index of each row's first outlier
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from reallm.codegen.ir.operations import CodegenError
from reallm.codegen.triton.trellis import ORDER_AT, RUNS_AT
from reallm.kernels.codes.packing import unpack_codes
from reallm.kernels.codes.trellis import WORDS_PER_WIDTH, check_widths
from reallm.kernels.formats.codecs import TILE, TrellisCodec
from reallm.kernels.formats.formats import Format

if TYPE_CHECKING:
    import torch

MAX_WIDTH = 16
_DAMAGED = "; the artifact is damaged: copy or compile it again"


@dataclass(frozen=True)
class Derived:
    """The derived tensors of a matrix by name, and the nonzero widths that occur in its trellis."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    widths: tuple[int, ...] = ()
    filled: bool = True
    """Whether every block of the trellis has a width other than 0."""


def trellis_index(
    codec: TrellisCodec, widths: NDArray[np.integer], scales: NDArray[np.float16], rows: int, cols: int
) -> NDArray[np.int32]:
    """The tensor `index` (see the module's docstring). Raises CodegenError for widths that contradict the format."""
    try:
        check_widths(codec, widths, cols)
    except ValueError as error:
        raise CodegenError(str(error)) from error
    wide = widths.astype(np.int64)
    words = -(-rows // TILE) * WORDS_PER_WIDTH * wide
    starts = np.cumsum(words) - words
    order = np.argsort(wide, kind="stable")
    largest = float(np.abs(scales[wide > 0].astype(np.float32)).max(initial=0.0)) or 1.0
    unit = np.array([2.0 ** np.ceil(np.log2(largest))], np.float32)
    runs = np.searchsorted(wide[order], np.arange(MAX_WIDTH + 1))
    result = np.concatenate([unit.view(np.int32), runs, order, starts[order]]).astype(np.int32)
    assert len(result) == ORDER_AT + 2 * len(wide) and RUNS_AT + MAX_WIDTH + 1 == ORDER_AT
    return result


def present_widths(index: NDArray[np.int32]) -> tuple[int, ...]:
    """The nonzero widths that occur among the blocks of an `index` tensor."""
    runs = index[RUNS_AT:ORDER_AT]
    return tuple(width for width in range(1, MAX_WIDTH) if runs[width] < runs[width + 1])


def derive(fmt: Format, fields: Mapping[str, torch.Tensor], rows: int, cols: int) -> Derived:
    """All derived tensors that kernels of `fmt` read, on the device of the fields. Synchronises with the device.

    Raises CodegenError for fields that contradict each other, so that kernels never index with invalid values.
    """
    import torch

    result: dict[str, torch.Tensor] = {}
    present: tuple[int, ...] = ()
    filled = True
    if isinstance(codec := fmt.codec, TrellisCodec):
        device, across = fields["widths"].device, -(-cols // TILE)
        widths = unpack_codes(fields["widths"].cpu().numpy(), 4, across)
        scales = fields["scales"].cpu().numpy()[: 2 * across].view("<f2").copy()
        index = trellis_index(codec, widths, scales, rows, cols)
        scales[widths == 0] = 0
        result = {"index": torch.from_numpy(index).to(device), "scales": torch.from_numpy(scales).to(device)}
        present, filled = present_widths(index), bool(widths.all())
    if fmt.sparse:
        device = fields["sparse_counts"].device
        counts = unpack_codes(fields["sparse_counts"].cpu().numpy(), 16, rows).astype(np.int64)
        columns = unpack_codes(fields["sparse_cols"].cpu().numpy(), 16, fmt.sparse.count(rows, cols))
        if int(counts.sum()) != len(columns) or int(columns.max(initial=0)) >= cols:
            raise CodegenError(f"the fields of the outliers contradict each other{_DAMAGED}")
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        result["sparse_offsets"] = torch.from_numpy(offsets).to(device)
    if fmt.permuted:
        order = unpack_codes(fields["permutation"].cpu().numpy(), 16, cols)
        if not np.array_equal(np.sort(order), np.arange(cols)):
            raise CodegenError(f"field 'permutation' is not a permutation of the columns{_DAMAGED}")
    return Derived(result, present, filled)
