"""Lowering: translates the format of a matrix into operations, which depend on nothing else.

`LOWERINGS` gives the operations of each codec. To support a new codec, add an entry; it is None for a codec without a
generated kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from reallm.kernels.codes.trellis import CODE_MEAN, CODE_UNIT
from reallm.kernels.formats.codecs import (
    TILE,
    AdditiveCodec,
    AnyCodec,
    DenseCodec,
    KMeansCodec,
    LatticeCodec,
    NeuralCodec,
    ScalarCodec,
    TrellisCodec,
)
from reallm.kernels.formats.formats import Format
from reallm.planner.tables.plan import Plan

from .operations import (
    LIFT,
    AddBias,
    AddLowRank,
    AddSparse,
    Centre,
    Codebooks,
    CodegenError,
    ColumnScale,
    Dot,
    GroupScale,
    Lattice,
    Levels,
    Offset,
    Operation,
    Prepare,
    Project,
    RowLevels,
    Store,
    Trellis,
    Unpack,
    Unrotate,
)
from .program import MatrixProgram, Program

Operations = tuple[Operation, ...]


def _scalar(codec: ScalarCodec) -> Operations:
    uint = codec.table == "uint"
    level = Offset(codec.bits, codec.group_size) if uint else Levels(codec.table, codec.bits)
    return (Unpack(codec.bits), level, GroupScale(codec.group_size, codec.double_quant))


def _additive(codec: AdditiveCodec) -> Operations:
    count, bits, dim = codec.num_codebooks, codec.codebook_bits, codec.dim
    return (Unpack(bits, count, dim), Codebooks(count, bits, dim), GroupScale(0))


def _kmeans(codec: KMeansCodec) -> Operations:
    return (Unpack(codec.bits), RowLevels(codec.bits))


def _lattice(codec: LatticeCodec) -> Operations:
    return (Unpack(16, 1, 8), Lattice(codec.bits), ColumnScale(TILE))


def _trellis(codec: TrellisCodec) -> Operations:
    return (Trellis(codec.state_bits), ColumnScale(TILE))


LOWERINGS: Mapping[type, Callable[[Any], Operations] | None] = {
    DenseCodec: None,
    ScalarCodec: _scalar,
    AdditiveCodec: _additive,
    KMeansCodec: _kmeans,
    TrellisCodec: _trellis,
    LatticeCodec: _lattice,
    NeuralCodec: None,
}
"""For each codec class, the operations from packed words to scaled values; None for a codec without a kernel."""


def has_kernel(fmt: Format) -> bool:
    """Whether kernels can be generated for `fmt`; matrices in other formats run on their decoded weight."""
    return LOWERINGS[type(fmt.codec)] is not None


def decode_operations(codec: AnyCodec) -> Operations:
    """The operations from packed words to scaled values. Raises CodegenError for a codec without a kernel."""
    lowering = LOWERINGS[type(codec)]
    if lowering is None:
        raise CodegenError(f"codec {codec.name!r} has no generated kernel; use the decoded weight")
    return lowering(codec)


def lower(fmt: Format, bias: bool = False, prefill: bool = False) -> Operations:
    """The operations of a compressed format, before any pass. Raises CodegenError for a format without kernels.

    With `prefill` the operations are for a GEMM, that is, for many rows of x. A GEMM subtracts the mean of a trellis'
    values while it decodes them, so no `Centre` is needed.
    """
    if isinstance(fmt.codec, DenseCodec):
        raise CodegenError(f"format {fmt.name!r} is dense: there is nothing to decode; multiply with torch")
    if not has_kernel(fmt):
        raise CodegenError(f"format {fmt.name!r} has no generated kernel; use the decoded weight")
    low_rank, trellis = fmt.low_rank, isinstance(fmt.codec, TrellisCodec)
    before: Operations = (Project(low_rank.dtype),) if low_rank else ()
    after: Operations = ()
    if fmt.transformed or trellis:
        before += (Prepare(fmt.rotated, fmt.permuted, fmt.channel_scales, LIFT if trellis else 0),)
        after = (Centre(CODE_MEAN * CODE_UNIT / 2.0**LIFT),) if trellis and not prefill else ()
        after += (Unrotate(fmt.rotated),)
    after += (AddSparse(),) if fmt.sparse else ()
    after += (AddLowRank(low_rank.rank, low_rank.dtype),) if low_rank else ()
    after += (AddBias(),) if bias else ()
    return (*before, *decode_operations(fmt.codec), Dot(), *after, Store())


def lower_plan(plan: Plan, biased: Collection[str] = ()) -> Program:
    """The program, before any pass, of the matrices of a plan that have kernels; `biased` names those with a bias."""
    matrices = []
    for choice in plan.choices:
        fmt = Format.parse(choice.format)
        if has_kernel(fmt):
            operations = lower(fmt, choice.matrix in biased)
            matrices.append(MatrixProgram(choice.matrix, choice.rows, choice.cols, fmt, operations))
    return Program(tuple(matrices))
