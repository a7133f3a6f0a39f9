"""The typed operations a stored matrix is made of, from packed words to y = W_hat x.

Each operation turns one kind of value into another; `program.verify_program` checks that the kinds meet. Shapes are
those of one tile, BLOCK_N rows by BLOCK_K columns of W[N, K]:

    words    packed fields, as 32-bit words          values   decoded weights [BLOCK_N, BLOCK_K]
    codes    whole numbers [BLOCK_N, BLOCK_K/dim]    sums     float32 [BLOCK_N], one for each row of x

A transformed matrix W = T^-1(C) is multiplied as T'^-1(C (T x)): `Prepare` makes T x, `Unrotate` undoes the rotation of
the output.

Formulas are those of `reallm.kernels.formats.formats`; an operation names the stored fields it reads and their dtypes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

from reallm.kernels.codes.packing import plane_widths
from reallm.kernels.codes.tables import TableName
from reallm.kernels.errors import ReallmError
from reallm.kernels.formats.codecs import DoubleQuant

Value = Literal["words", "codes", "values", "sums", "stored"]
Read: TypeAlias = tuple[str, str]
"""A stored field and its dtype, as in `kernels.formats.Field`."""


LIFT = 76
"""Binary logarithm of what x is multiplied by where codes are read as denormal floats, see `trellis`: products are
normal floats for x of 2^-52 to 2^52."""


class CodegenError(ReallmError, ValueError):
    """A program that cannot be, or a kernel that cannot be built or called as asked."""


@dataclass(frozen=True, slots=True)
class Project:
    """t[m, r] = scale_r * sum_k R[r, k] x[m, k]: the small half of the low-rank term, float32 [M, rank]."""

    dtype: str

    takes: ClassVar[Value] = "words"
    gives: ClassVar[Value] = "words"

    @property
    def reads(self) -> tuple[Read, ...]:
        scales = (("left_scales", "f16"), ("right_scales", "f16")) if self.dtype != "f16" else ()
        return (("right", stored_factor(self.dtype)), *scales)

    def __str__(self) -> str:
        return f"project {self.dtype}"


@dataclass(frozen=True, slots=True)
class Prepare:
    """x' = R_K P (channel_scales * x) / norm, float32 [M, K padded to whole blocks]; norm [M] is a power of two.

    P x [j] = x[permutation[j]]. The norm brings the largest entry of a row of x to between 1 and 2, so that x' fits
    half precision whatever the model's activations are; then x' is multiplied by 2^lift.
    """

    rotated: bool = False
    permuted: bool = False
    channel_scales: bool = False
    lift: int = 0

    takes: ClassVar[Value] = "words"
    gives: ClassVar[Value] = "words"

    @property
    def reads(self) -> tuple[Read, ...]:
        permutation = (("permutation", "u16"),) if self.permuted else ()
        return (*permutation, *((("channel_scales", "f16"),) if self.channel_scales else ()))

    @property
    def label(self) -> str:
        """The steps in the order they are done."""
        steps = {"cs": self.channel_scales, "perm": self.permuted, "rot": self.rotated}
        return "-".join(name for name, wanted in steps.items() if wanted) or "plain"

    def __str__(self) -> str:
        return f"prepare {self.label}" + (f" times 2^{self.lift}" if self.lift else "")


@dataclass(frozen=True, slots=True)
class Reuse:
    """x' of the matrix `leader`, which has the same input and prepares it in the same way."""

    leader: str
    rotated: bool

    takes: ClassVar[Value] = "words"
    gives: ClassVar[Value] = "words"

    @property
    def reads(self) -> tuple[Read, ...]:
        return ()

    def __str__(self) -> str:
        return f"reuse x' of {self.leader}"


@dataclass(frozen=True, slots=True)
class Trellis:
    """What the states of a bitshift trellis of 2^state_bits states stand for, as whole numbers (`kernels.trellis`)."""

    state_bits: int

    takes: ClassVar[Value] = "words"
    gives: ClassVar[Value] = "values"

    @property
    def reads(self) -> tuple[Read, ...]:
        return (("words", "u32"), ("widths", "u4"))

    def __str__(self) -> str:
        return f"trellis 2^{self.state_bits}"


@dataclass(frozen=True, slots=True)
class Lattice:
    """The word of 8 weights of E8P, and of its residual codebook, that each code stands for (`kernels.lattice`)."""

    bits: int

    takes: ClassVar[Value] = "codes"
    gives: ClassVar[Value] = "values"

    @property
    def reads(self) -> tuple[Read, ...]:
        return (("residuals", "u8" if self.bits == 3 else "u16"),) if self.bits > 2 else ()

    def __str__(self) -> str:
        return f"lattice e8p{self.bits}"


@dataclass(frozen=True, slots=True)
class RowLevels:
    """The level of the row's own table of 2^bits that each code stands for."""

    bits: int

    takes: ClassVar[Value] = "codes"
    gives: ClassVar[Value] = "values"

    @property
    def reads(self) -> tuple[Read, ...]:
        return (("levels", "f16"),)

    def __str__(self) -> str:
        return f"row_levels {self.bits}"


@dataclass(frozen=True, slots=True)
class ColumnScale:
    """values * scale of their block of `block` columns, the same in every row."""

    block: int

    takes: ClassVar[Value] = "values"
    gives: ClassVar[Value] = "values"

    @property
    def reads(self) -> tuple[Read, ...]:
        return (("scales", "f16"),)

    def __str__(self) -> str:
        return f"column_scale per {self.block}"


@dataclass(frozen=True, slots=True)
class Unpack:
    """Planar codes of `bits` bits: `count` codes for every `dim` weights (1 for 1 in a scalar codec)."""

    bits: int
    count: int = 1
    dim: int = 1

    takes: ClassVar[Value] = "words"
    gives: ClassVar[Value] = "codes"

    @property
    def reads(self) -> tuple[Read, ...]:
        return (("codes", f"u{self.bits}"),)

    def __str__(self) -> str:
        planes = " + ".join(str(width) for width in plane_widths(self.bits))
        return f"unpack {self.count} x u{self.bits} ({planes}) per {self.dim}"


@dataclass(frozen=True, slots=True)
class Levels:
    """The level of a scalar table that each code stands for."""

    table: TableName
    bits: int

    takes: ClassVar[Value] = "codes"
    gives: ClassVar[Value] = "values"

    @property
    def reads(self) -> tuple[Read, ...]:
        return ()

    def __str__(self) -> str:
        return f"levels {self.table}{self.bits}"


@dataclass(frozen=True, slots=True)
class Offset:
    """code - zero, one zero for every group of a row (`uint`)."""

    bits: int
    group_size: int

    takes: ClassVar[Value] = "codes"
    gives: ClassVar[Value] = "values"

    @property
    def reads(self) -> tuple[Read, ...]:
        return (("zeros", f"u{self.bits}"),)

    def __str__(self) -> str:
        return f"offset u{self.bits} per {self.group_size or 'row'}"


@dataclass(frozen=True, slots=True)
class Codebooks:
    """The sum of `count` words of `dim` weights, each from its own codebook of 2^bits words."""

    count: int
    bits: int
    dim: int

    takes: ClassVar[Value] = "codes"
    gives: ClassVar[Value] = "values"

    @property
    def reads(self) -> tuple[Read, ...]:
        return (("codebooks", "f16"),)

    def __str__(self) -> str:
        return f"codebooks {self.count} x 2^{self.bits} words of {self.dim}"


@dataclass(frozen=True, slots=True)
class GroupScale:
    """values * scale of their group; group_size 0 is the whole row."""

    group_size: int
    double_quant: DoubleQuant | None = None

    takes: ClassVar[Value] = "values"
    gives: ClassVar[Value] = "values"

    @property
    def reads(self) -> tuple[Read, ...]:
        return scale_reads(self.double_quant)

    def __str__(self) -> str:
        return f"group_scale per {self.group_size or 'row'}{_double(self.double_quant)}"


@dataclass(frozen=True, slots=True)
class Dot:
    """sums[m, n] = sum_k values[n, k] x[m, k] in float32."""

    takes: ClassVar[Value] = "values"
    gives: ClassVar[Value] = "sums"

    @property
    def reads(self) -> tuple[Read, ...]:
        return ()

    def __str__(self) -> str:
        return "dot"


@dataclass(frozen=True, slots=True)
class Keep:
    """The values themselves, for a product by a library: dense [N, K] in the dtype of x or, of a transformed matrix, in
    half precision; those of a trellis over the power of two that no scale exceeds."""

    takes: ClassVar[Value] = "values"
    gives: ClassVar[Value] = "stored"
    reads: ClassVar[tuple[Read, ...]] = ()

    def __str__(self) -> str:
        return "keep"


@dataclass(frozen=True, slots=True)
class RowScale:
    """sums * scale of their row: a GroupScale over the whole row, moved behind the Dot."""

    double_quant: DoubleQuant | None = None

    takes: ClassVar[Value] = "sums"
    gives: ClassVar[Value] = "sums"

    @property
    def reads(self) -> tuple[Read, ...]:
        return scale_reads(self.double_quant)

    def __str__(self) -> str:
        return f"row_scale{_double(self.double_quant)}"


@dataclass(frozen=True, slots=True)
class Centre:
    """sums - mean * sum_k scale_k x'_k: the mean of the values of a trellis, which `Dot` left in."""

    mean: float

    takes: ClassVar[Value] = "sums"
    gives: ClassVar[Value] = "sums"
    reads: ClassVar[tuple[Read, ...]] = ()

    def __str__(self) -> str:
        return f"centre {self.mean:g}"


@dataclass(frozen=True, slots=True)
class Unrotate:
    """R_N^T sums, and the norm of `Prepare` multiplied back."""

    rotated: bool

    takes: ClassVar[Value] = "sums"
    gives: ClassVar[Value] = "sums"

    @property
    def reads(self) -> tuple[Read, ...]:
        return ()

    def __str__(self) -> str:
        return "unrotate" if self.rotated else "renorm"


@dataclass(frozen=True, slots=True)
class AddSparse:
    """sums + S x, S the outliers kept apart, by rows."""

    takes: ClassVar[Value] = "sums"
    gives: ClassVar[Value] = "sums"

    @property
    def reads(self) -> tuple[Read, ...]:
        return (("sparse_counts", "u16"), ("sparse_cols", "u16"), ("sparse_values", "f16"))

    def __str__(self) -> str:
        return "add_sparse"


@dataclass(frozen=True, slots=True)
class AddLowRank:
    """sums + L t with t from `Project`."""

    rank: int
    dtype: str

    takes: ClassVar[Value] = "sums"
    gives: ClassVar[Value] = "sums"

    @property
    def reads(self) -> tuple[Read, ...]:
        return (("left", stored_factor(self.dtype)),)

    def __str__(self) -> str:
        return f"add_low_rank {self.rank} {self.dtype}"


@dataclass(frozen=True, slots=True)
class AddBias:
    """sums + bias[n]; the bias is a tensor of the model, not a field of the matrix."""

    takes: ClassVar[Value] = "sums"
    gives: ClassVar[Value] = "sums"

    @property
    def reads(self) -> tuple[Read, ...]:
        return ()

    def __str__(self) -> str:
        return "add_bias"


@dataclass(frozen=True, slots=True)
class Store:
    """y[m, n] in the dtype of x."""

    takes: ClassVar[Value] = "sums"
    gives: ClassVar[Value] = "stored"

    @property
    def reads(self) -> tuple[Read, ...]:
        return ()

    def __str__(self) -> str:
        return "store"


Operation: TypeAlias = (
    Project
    | Prepare
    | Reuse
    | Trellis
    | Unpack
    | Levels
    | Offset
    | Codebooks
    | Lattice
    | RowLevels
    | GroupScale
    | ColumnScale
    | Dot
    | Keep
    | RowScale
    | Centre
    | Unrotate
    | AddLowRank
    | AddSparse
    | AddBias
    | Store
)


def stored_factor(dtype: str) -> str:
    """How a factor of a low-rank term is stored: 4-bit ones as codes."""
    return "u4" if dtype == "i4" else dtype


def scale_reads(double_quant: DoubleQuant | None) -> tuple[Read, ...]:
    """The fields that hold scales, plain or double-quantised."""
    if double_quant is None:
        return (("scales", "f16"),)
    return (("scale_codes", f"u{double_quant.bits}"), ("scale_ranges", "f16"), ("scale_min", "f32"))


def _double(double_quant: DoubleQuant | None) -> str:
    return f" dq{double_quant.bits}x{double_quant.block}" if double_quant else ""
