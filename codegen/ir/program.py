"""The program of a plan: for each compressed matrix the typed operations that compute y = W_hat x, printable.

    plan --lower--> operations --passes--> operations, tiles and shared kernels --emit--> Triton

`lower` reads nothing but the format; `verify_program` runs before and after every pass (`passes.run_passes`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from reallm.kernels.codes.packing import WORD_BITS, plane_widths
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

from .dataflow import shared_inputs
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
    Keep,
    Lattice,
    Levels,
    Offset,
    Operation,
    Prepare,
    Project,
    Reuse,
    RowLevels,
    RowScale,
    Store,
    Trellis,
    Unpack,
    Unrotate,
)

SPAN = 32
"""Columns that a thread takes at a time where rows are whole spans: whole words of every plane."""
GEMM_BATCH = 16
"""Rows of x from which on one instance is a GEMM: the least that tensor cores take."""
MAX_CODES = 2**31
"""Codes of one matrix, so that every index of a chunk fits 32 bits."""


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program instance works on: block_n rows, block_k columns at a time, num_warps * 32 threads."""

    block_n: int
    block_k: int
    num_warps: int

    def __str__(self) -> str:
        return f"n{self.block_n}-k{self.block_k}-w{self.num_warps}"


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """Everything a generated kernel is specialised on; equal specs give byte-equal sources.

    `label` is the format without what no kernel can see (feedback, sharing of codebooks). `aligned` says that a row
    is whole chunks (see `chunk_width`), `even` that it is whole tiles, `batch` how many rows of x one instance takes:
    GEMM_BATCH or more make a GEMM. `widths` are the widths of blocks that a trellis kernel can decode.
    """

    label: str
    operations: tuple[Operation, ...]
    tile: Tile
    aligned: bool
    even: bool
    batch: int = 1
    widths: tuple[int, ...] = ()
    span: int = 0
    """SPAN where a scalar product has rows of whole spans (`spans`), else 0."""
    pieces: int = 0
    """Of a rotation, that an instance has at once; `even` says that these are all."""
    members: int = 1
    """Matrices that one launch serves, see `groups`."""

    @property
    def function(self) -> str:
        """The kernel's name in its source."""
        match self.operations[0]:
            case Project():
                return "project"
            case Prepare():
                return "prepare"
            case Unrotate():
                return "finish"
        if isinstance(self.operations[-1], Keep):
            return "dense"
        return "gemm" if self.batch >= GEMM_BATCH else "gemv"

    @property
    def name(self) -> str:
        """Unique in a program; also the stem of its files."""
        facts = ("" if self.aligned else "-unaligned") + ("" if self.even else "-tail")
        batch = f"-m{self.batch}" if self.batch > 1 else ""
        widths = "-b" + "_".join(str(width) for width in self.widths) if self.widths else ""
        span = f"-s{self.span}" if self.span else ""
        pieces = f"-p{self.pieces}" if self.pieces else ""
        members = f"-x{self.members}" if self.members > 1 else ""
        return (
            f"{self.function}-{self.label.replace('+', '-')}-{self.tile}{facts}{span}{batch}{widths}{pieces}{members}"
        )


@dataclass(frozen=True, slots=True)
class MatrixProgram:
    """The operations of one matrix W[rows, cols], and the kernels that run them in order."""

    name: str
    rows: int
    cols: int
    format: Format
    operations: tuple[Operation, ...]
    tile: Tile | None = None
    kernels: tuple[KernelSpec, ...] = ()
    prefill: bool = False
    """For many rows of x: a GEMM."""

    def __str__(self) -> str:
        lines = [f"matrix {self.name} [{self.rows}, {self.cols}] {self.format.name}"]
        lines += [f"  {op.gives:<7}= {op}" for op in self.operations]
        lines += [f"  tile {self.tile}"] if self.tile else []
        lines += [f"  kernel {kernel.name}" for kernel in self.kernels]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Group:
    """Matrices of one input, by name in the program's order, for which one launch of `kernel` makes all products, or
    finishes them. Each keeps its own kernels too, for a call by itself."""

    matrices: tuple[str, ...]
    kernel: KernelSpec

    def __str__(self) -> str:
        return f"group {' '.join(self.matrices)}\n  kernel {self.kernel.name}"


@dataclass(frozen=True, slots=True)
class Program:
    """The compressed matrices of a plan, in the plan's order; `str` prints all of it."""

    matrices: tuple[MatrixProgram, ...]
    groups: tuple[Group, ...] = ()

    @property
    def kernels(self) -> tuple[KernelSpec, ...]:
        """The distinct kernels, by name."""
        own = {kernel for matrix in self.matrices for kernel in matrix.kernels}
        return tuple(sorted(own | {group.kernel for group in self.groups}, key=lambda kernel: kernel.name))

    def __str__(self) -> str:
        return "\n".join(str(part) for part in (*self.matrices, *self.groups)) + "\n"


def prepared_by(matrix: MatrixProgram) -> str:
    """The matrix that makes the x' which `matrix` multiplies: itself or another one; "" where it multiplies x."""
    for operation in matrix.operations:
        if isinstance(operation, Reuse):
            return operation.leader
        if isinstance(operation, Prepare):
            return matrix.name
    return ""


def chunk_width(unpack: Unpack) -> int:
    """Columns a tile handles as one: those of a word of the widest plane, or those of one additive group."""
    return unpack.dim if unpack.dim > 1 else WORD_BITS // plane_widths(unpack.bits)[0]


def has_kernel(fmt: Format) -> bool:
    """Whether kernels can be generated for `fmt`; the others run on their decoded weight."""
    return not isinstance(fmt.codec, DenseCodec | NeuralCodec)


def decode_operations(codec: AnyCodec) -> tuple[Operation, ...]:
    """From words to scaled values."""
    match codec:
        case AdditiveCodec(count, bits, dim):
            return (Unpack(bits, count, dim), Codebooks(count, bits, dim), GroupScale(0))
        case KMeansCodec(bits):
            return (Unpack(bits), RowLevels(bits))
        case LatticeCodec(bits):
            return (Unpack(16, 1, 8), Lattice(bits), ColumnScale(TILE))
        case TrellisCodec():
            return (Trellis(codec.state_bits), ColumnScale(TILE))
        case ScalarCodec():
            uint = codec.table == "uint"
            level = Offset(codec.bits, codec.group_size) if uint else Levels(codec.table, codec.bits)
            return (Unpack(codec.bits), level, GroupScale(codec.group_size, codec.double_quant))
    raise CodegenError(f"codec {codec.name!r} has no generated kernel; use the decoded weight")


def lower(fmt: Format, bias: bool = False, prefill: bool = False) -> tuple[Operation, ...]:
    """The operations of a compressed format, unoptimised. Raises CodegenError for one without kernels.

    `prefill` is for many rows of x: a GEMM decodes the values of a trellis around their mean.
    """
    if isinstance(fmt.codec, DenseCodec):
        raise CodegenError(f"format {fmt.name!r} is dense: there is nothing to decode; call torch")
    if not has_kernel(fmt):
        raise CodegenError(f"format {fmt.name!r} has no generated kernel; use the decoded weight")
    low, trellis = fmt.low_rank, isinstance(fmt.codec, TrellisCodec)
    before: tuple[Operation, ...] = (Project(low.dtype),) if low else ()
    after: tuple[Operation, ...] = ()
    if fmt.transformed or trellis:
        before += (Prepare(fmt.rotated, fmt.permuted, fmt.channel_scales, LIFT if trellis else 0),)
        after = (Centre(CODE_MEAN * CODE_UNIT / 2.0**LIFT),) if trellis and not prefill else ()
        after += (Unrotate(fmt.rotated),)
    after += (AddSparse(),) if fmt.sparse else ()
    after += (AddLowRank(low.rank, low.dtype),) if low else ()
    after += (AddBias(),) if bias else ()
    return (*before, *decode_operations(fmt.codec), Dot(), *after, Store())


def lower_plan(plan: Plan, biased: Collection[str] = ()) -> Program:
    """The program of a plan, before any pass, of the matrices that have kernels; `biased` names those with a bias."""
    matrices = []
    for choice in plan.choices:
        fmt = Format.parse(choice.format)
        if has_kernel(fmt):
            operations = lower(fmt, choice.matrix in biased)
            matrices.append(MatrixProgram(choice.matrix, choice.rows, choice.cols, fmt, operations))
    return Program(tuple(matrices))


def verify_program(program: Program) -> None:
    """Raise CodegenError, naming the matrix, unless each matrix's operations compute W_hat x from its stored fields."""
    earlier: dict[str, MatrixProgram] = {}
    for matrix in program.matrices:
        for fault in (*_faults(matrix), *_reuse_faults(matrix, earlier)):
            raise CodegenError(f"program of {matrix.name!r} ({matrix.format.name}): {fault}")
        earlier[matrix.name] = matrix
    for group in program.groups:
        for fault in _group_faults(group, program):
            raise CodegenError(f"group {' '.join(group.matrices)} ({group.kernel.name}): {fault}")
    names = [kernel.name for kernel in program.kernels]
    if len(set(names)) != len(names):
        raise CodegenError(f"two different kernels share a name among {', '.join(names)}")


def _faults(matrix: MatrixProgram) -> list[str]:
    """What is wrong with one matrix, in words."""
    return [
        *_kind_faults(matrix.operations),
        *_order_faults(matrix.operations),
        *_field_faults(matrix),
        *_kernel_faults(matrix),
    ]


def _reuse_faults(matrix: MatrixProgram, earlier: dict[str, MatrixProgram]) -> list[str]:
    faults = []
    for operation in matrix.operations:
        if isinstance(operation, Reuse):
            leader = earlier.get(operation.leader)
            made = [op for op in leader.operations if isinstance(op, Prepare)] if leader else []
            if (
                not leader
                or leader.cols != matrix.cols
                or [(op.rotated, op.reads) for op in made] != [(operation.rotated, ())]
            ):
                faults.append(f"{operation}, which no earlier matrix of {matrix.cols} columns makes for others")
    return faults


def _group_faults(group: Group, program: Program) -> list[str]:
    """What is wrong with a group: what its kernel takes for shared must be, and nothing may be made twice."""
    order = {matrix.name: index for index, matrix in enumerate(program.matrices)}
    if unknown := [name for name in group.matrices if name not in order]:
        return [f"there is no matrix {unknown[0]!r}"]
    members = [program.matrices[order[name]] for name in group.matrices]
    kernel, own = group.kernel, [_own_kernel(matrix, group.kernel.function) for matrix in members]
    faults = []
    if kernel.members != len(members) or len(members) < 2:
        faults.append(f"has {len(members)} matrices for a kernel of {kernel.members}")
    if [order[name] for name in group.matrices] != sorted({order[name] for name in group.matrices}):
        faults.append("does not name each matrix once in the program's order, the leader first")
    if len(set(shared_inputs(group.matrices).values())) > 1 or len({prepared_by(matrix) for matrix in members}) > 1:
        faults.append("multiplies different inputs")
    if len({matrix.cols for matrix in members}) > 1:
        faults.append("multiplies matrices of different numbers of columns")
    if any(single is None or single.operations != kernel.operations for single in own):
        faults.append("has a kernel of other operations than its matrices'")
    for other in program.groups:
        both = set(other.matrices) & set(group.matrices)
        if other is not group and both and _is_finish(other.kernel) == _is_finish(kernel):
            faults.append(f"shares {sorted(both)[0]!r} with another group")
    products = [other for other in program.groups if not _is_finish(other.kernel)]
    if _is_finish(kernel) and not any(set(group.matrices) <= set(other.matrices) for other in products):
        faults.append("finishes matrices whose products are not one group")
    return faults


def _is_finish(kernel: KernelSpec) -> bool:
    return kernel.function == "finish"


def _own_kernel(matrix: MatrixProgram, function: str) -> KernelSpec | None:
    return next((kernel for kernel in matrix.kernels if kernel.function == function), None)


def _kind_faults(operations: tuple[Operation, ...]) -> list[str]:
    kind, faults = "words", []
    for operation in operations:
        if operation.takes != kind:
            faults.append(f"{operation} takes {operation.takes}, not {kind}")
        kind = operation.gives
    return faults if kind == "stored" else [*faults, f"ends in {kind}, not in a store"]


def _order_faults(operations: tuple[Operation, ...]) -> list[str]:
    faults = []
    kinds = GroupScale | RowScale | ColumnScale | RowLevels
    scales = [index for index, op in enumerate(operations) if isinstance(op, kinds)]
    if len(scales) != 1:
        faults.append(f"has {len(scales)} scales, not one")
    elif isinstance(operations[scales[0]], RowScale) and not isinstance(operations[scales[0] - 1], Dot):
        faults.append("scales a row after something was added to it")
    projected = [op.dtype for op in operations if isinstance(op, Project)]
    if projected != [op.dtype for op in operations if isinstance(op, AddLowRank)]:
        faults.append("has a projection without its low-rank term, or the reverse")
    rotated = [op.rotated for op in operations if isinstance(op, Prepare | Reuse)]
    if rotated != [op.rotated for op in operations if isinstance(op, Unrotate)]:
        faults.append("rotates its input and not its output, or the reverse")
    if any(isinstance(op, Centre) for op in operations) and not any(isinstance(op, Trellis) for op in operations):
        faults.append("subtracts a mean that nothing left in")
    return faults


def _field_faults(matrix: MatrixProgram) -> list[str]:
    fields = matrix.format.fields(matrix.rows, matrix.cols)
    if shared := matrix.format.shared_field:
        fields = (*fields, shared)
    stored = {(field.name, field.dtype) for field in fields}
    read = {pair for operation in matrix.operations for pair in operation.reads}
    faults = [f"reads {sorted(read)}, but {sorted(stored)} are stored"] if read != stored else []
    codec = matrix.format.codec
    indexed = codec.group_count(matrix.cols) * codec.num_codebooks if isinstance(codec, AdditiveCodec) else 0
    if matrix.rows * max(indexed, -(-matrix.cols // 4)) >= MAX_CODES:
        faults.append(f"[{matrix.rows}, {matrix.cols}] has more codes than 32-bit indices reach")
    return faults


def _kernel_faults(matrix: MatrixProgram) -> list[str]:
    tile = matrix.tile
    faults = []
    if tile and any(size < 1 or size & (size - 1) for size in (tile.block_n, tile.block_k, tile.num_warps)):
        faults.append(f"tile {tile} is not made of powers of two")
    run = tuple(operation for kernel in matrix.kernels for operation in kernel.operations)
    own = tuple(operation for operation in matrix.operations if not isinstance(operation, Reuse))
    if matrix.kernels and run != own:
        faults.append("its kernels do not run its operations in order")
    return faults
