"""The typed operations that compute y = W_hat x from the stored fields of one matrix.

Every operation turns one kind of value into another, and `verify.verify_program` checks that the kinds fit together.
Shapes are those of one tile, BLOCK_N rows by BLOCK_K columns of W[N, K]:

    words    packed fields, as 32-bit words          values   decoded weights [BLOCK_N, BLOCK_K]
    codes    integers [BLOCK_N, BLOCK_K/dim]         sums     float32 [BLOCK_N] for each row of x
    stored   the result, which the kernel has written to memory

A transformed matrix W = T^-1(C) is multiplied as T'^-1(C (T x)): `Prepare` computes T x, and `Unrotate` undoes the
rotation of the output. The formulas are those of `reallm.kernels.formats.formats`.

To add an operation, write a frozen dataclass with its parameters as fields, choose the base class for the kinds that
it takes and gives, list the stored fields that it reads, and define its printed form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

from reallm.kernels.errors import ReallmError
from reallm.kernels.formats.bit_planes import WORD_BITS, plane_widths
from reallm.kernels.formats.codecs import DoubleQuant, TableName

Value = Literal["words", "codes", "values", "sums", "stored"]
Read: TypeAlias = tuple[str, str]
"""Name and dtype of a stored field, as in `kernels.formats.codecs.Field`."""

SCALES: Read = ("scales", "f16")

LIFT = 76
"""x is multiplied by 2^LIFT if codes are read as denormal floats (see `triton.trellis`), so that the products are
normal floats for x from 2^-52 to 2^52."""


class CodegenError(ReallmError, ValueError):
    """A program is invalid, or a kernel cannot be built or called as requested."""


@dataclass(frozen=True, slots=True)
class Operation:
    """Base class of all operations. `takes` and `gives` are the kinds of value before and after the operation."""

    takes: ClassVar[Value]
    gives: ClassVar[Value]
    fields: ClassVar[tuple[Read, ...]] = ()
    """Stored fields that the operation reads for all values of its parameters."""
    text: ClassVar[str]
    """The printed form: a format string in which `op` is the operation."""

    @property
    def reads(self) -> tuple[Read, ...]:
        """Stored fields that the operation reads."""
        return self.fields

    def __str__(self) -> str:
        return self.text.format(op=self)


class InputOperation(Operation):
    """An operation on x, which runs before the packed words are read."""

    __slots__ = ()
    takes = "words"
    gives = "words"


class Decode(Operation):
    """Turns codes into weights."""

    __slots__ = ()
    takes = "codes"
    gives = "values"


class Scale(Operation):
    """Multiplies decoded weights."""

    __slots__ = ()
    takes = "values"
    gives = "values"


class SumOperation(Operation):
    """An operation on the sums of a product."""

    __slots__ = ()
    takes = "sums"
    gives = "sums"


# On x


@dataclass(frozen=True, slots=True)
class Project(InputOperation):
    """t[m, r] = scale_r * sum_k R[r, k] x[m, k]: the right factor of the low-rank term, float32 [M, rank]."""

    dtype: str

    text = "project {op.dtype}"

    @property
    def reads(self) -> tuple[Read, ...]:
        scales = (("left_scales", "f16"), ("right_scales", "f16")) if self.dtype != "f16" else ()
        return (("right", stored_factor(self.dtype)), *scales)


@dataclass(frozen=True, slots=True)
class Prepare(InputOperation):
    """x' = R_K P (channel_scales * x) / norm, float32 [M, K padded to whole blocks]; norm [M] is a power of two.

    R_K is the rotation of the input, and (P x)[j] = x[permutation[j]]. After division by the norm the largest entry of
    a row of x lies between 1 and 2, so that x' fits half precision for all activations; then x' is multiplied by
    2^lift.
    """

    rotated: bool = False
    permuted: bool = False
    channel_scales: bool = False
    lift: int = 0

    @property
    def reads(self) -> tuple[Read, ...]:
        permutation = (("permutation", "u16"),) if self.permuted else ()
        return (*permutation, *((("channel_scales", "f16"),) if self.channel_scales else ()))

    @property
    def label(self) -> str:
        """The steps in the order in which they are done."""
        steps = {"cs": self.channel_scales, "perm": self.permuted, "rot": self.rotated}
        return "-".join(name for name, enabled in steps.items() if enabled) or "plain"

    def __str__(self) -> str:
        return f"prepare {self.label}" + (f" times 2^{self.lift}" if self.lift else "")


@dataclass(frozen=True, slots=True)
class Reuse(InputOperation):
    """x' of the matrix `leader`, which has the same input and prepares it in the same way."""

    leader: str
    rotated: bool

    text = "reuse x' of {op.leader}"


# From words to values


@dataclass(frozen=True, slots=True)
class Unpack(Operation):
    """Reads codes of `bits` bits from their bit planes: `count` codes per `dim` weights (1 per 1 in a scalar codec)."""

    bits: int
    count: int = 1
    dim: int = 1

    takes = "words"
    gives = "codes"

    @property
    def reads(self) -> tuple[Read, ...]:
        return (("codes", f"u{self.bits}"),)

    @property
    def chunk_width(self) -> int:
        """Number of columns of a chunk; a kernel handles the columns of a chunk together.

        A chunk is the columns of one word of the widest bit plane, or those of one group of an additive codec.
        """
        return self.dim if self.dim > 1 else WORD_BITS // plane_widths(self.bits)[0]

    def __str__(self) -> str:
        planes = " + ".join(str(width) for width in plane_widths(self.bits))
        return f"unpack {self.count} x u{self.bits} ({planes}) per {self.dim}"


@dataclass(frozen=True, slots=True)
class Trellis(Operation):
    """Decodes a trellis with 2^state_bits states to the integer values of its states (`kernels.codes.trellis`)."""

    state_bits: int

    takes = "words"
    gives = "values"
    fields = (("words", "u32"), ("widths", "u4"))
    text = "trellis 2^{op.state_bits}"


@dataclass(frozen=True, slots=True)
class Levels(Decode):
    """Looks up the value of each code in a table."""

    table: TableName
    bits: int

    text = "levels {op.table}{op.bits}"


@dataclass(frozen=True, slots=True)
class RowLevels(Decode):
    """Looks up the value of each code in a table of 2^bits levels, which every row has separately."""

    bits: int

    fields = (("levels", "f16"),)
    text = "row_levels {op.bits}"


@dataclass(frozen=True, slots=True)
class Offset(Decode):
    """code - zero, with one zero point for each group of a row (`uint`)."""

    bits: int
    group_size: int

    @property
    def reads(self) -> tuple[Read, ...]:
        return (("zeros", f"u{self.bits}"),)

    def __str__(self) -> str:
        return f"offset u{self.bits} per {self.group_size or 'row'}"


@dataclass(frozen=True, slots=True)
class Codebooks(Decode):
    """The sum of `count` vectors of `dim` weights, one from each of `count` codebooks of 2^bits vectors."""

    count: int
    bits: int
    dim: int

    fields = (("codebooks", "f16"),)
    text = "codebooks {op.count} x 2^{op.bits} words of {op.dim}"


@dataclass(frozen=True, slots=True)
class Lattice(Decode):
    """The vectors of 8 weights that the codes select from the codebook E8P and its residual codebook.

    See `kernels.codes.lattice`.
    """

    bits: int

    text = "lattice e8p{op.bits}"

    @property
    def reads(self) -> tuple[Read, ...]:
        return (("residuals", "u8" if self.bits == 3 else "u16"),) if self.bits > 2 else ()


@dataclass(frozen=True, slots=True)
class ColumnScale(Scale):
    """values * the scale of their block of `block` columns; all rows have the same scale."""

    block: int

    fields = (SCALES,)
    text = "column_scale per {op.block}"


@dataclass(frozen=True, slots=True)
class GroupScale(Scale):
    """values * the scale of their group of `group_size` weights in a row; 0 means the whole row."""

    group_size: int
    double_quant: DoubleQuant | None = None

    @property
    def reads(self) -> tuple[Read, ...]:
        return scale_reads(self.double_quant)

    def __str__(self) -> str:
        return f"group_scale per {self.group_size or 'row'}{_double(self.double_quant)}"


# The product


@dataclass(frozen=True, slots=True)
class Dot(Operation):
    """sums[m, n] = sum_k values[n, k] x[m, k] in float32."""

    takes = "values"
    gives = "sums"
    text = "dot"


@dataclass(frozen=True, slots=True)
class Keep(Operation):
    """Writes the values to memory as dense [N, K], which a library then multiplies.

    They have the dtype of x or, for a transformed matrix, half precision. The values of a trellis are divided by the
    smallest power of two that is at least as large as every scale.
    """

    takes = "values"
    gives = "stored"
    text = "keep"


# On the sums


@dataclass(frozen=True, slots=True)
class RowScale(SumOperation):
    """sums * the scale of their row: a GroupScale over the whole row, moved after the Dot."""

    double_quant: DoubleQuant | None = None

    @property
    def reads(self) -> tuple[Read, ...]:
        return scale_reads(self.double_quant)

    def __str__(self) -> str:
        return f"row_scale{_double(self.double_quant)}"


@dataclass(frozen=True, slots=True)
class Centre(SumOperation):
    """sums - mean * sum_k scale_k x'_k: removes the mean of a trellis' values, which `Dot` has not subtracted."""

    mean: float

    text = "centre {op.mean:g}"


@dataclass(frozen=True, slots=True)
class Unrotate(SumOperation):
    """norm * R_N^T sums: undoes the rotation of the output, and the division by the norm in `Prepare`."""

    rotated: bool

    def __str__(self) -> str:
        return "unrotate" if self.rotated else "renorm"


@dataclass(frozen=True, slots=True)
class AddSparse(SumOperation):
    """sums + S x, where S holds the outliers, stored row by row."""

    fields = (("sparse_counts", "u16"), ("sparse_cols", "u16"), ("sparse_values", "f16"))
    text = "add_sparse"


@dataclass(frozen=True, slots=True)
class AddLowRank(SumOperation):
    """sums + L t, where `Project` computed t."""

    rank: int
    dtype: str

    text = "add_low_rank {op.rank} {op.dtype}"

    @property
    def reads(self) -> tuple[Read, ...]:
        return (("left", stored_factor(self.dtype)),)


@dataclass(frozen=True, slots=True)
class AddBias(SumOperation):
    """sums + bias[n]; the bias is a tensor of the model, not a field of the matrix."""

    text = "add_bias"


@dataclass(frozen=True, slots=True)
class Store(Operation):
    """Writes y[m, n] in the dtype of x."""

    takes = "sums"
    gives = "stored"
    text = "store"


def stored_factor(dtype: str) -> str:
    """The dtype of the field that stores a low-rank factor of type `dtype`; 4-bit factors are stored as codes."""
    return "u4" if dtype == "i4" else dtype


def scale_reads(double_quant: DoubleQuant | None) -> tuple[Read, ...]:
    """The stored fields that hold plain or double-quantised scales."""
    if double_quant is None:
        return (SCALES,)
    return (("scale_codes", f"u{double_quant.bits}"), ("scale_ranges", "f16"), ("scale_min", "f32"))


def _double(double_quant: DoubleQuant | None) -> str:
    return f" dq{double_quant.bits}x{double_quant.block}" if double_quant else ""
