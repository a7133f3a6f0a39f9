"""The typed operations a stored matrix is made of, from packed words to y = W_hat x.

Each operation turns one kind of value into another; `program.verify_program` checks that the kinds meet. Shapes are
those of one tile, BLOCK_N rows by BLOCK_K columns of W[N, K]:

    words    packed fields, as 32-bit words          values   decoded weights, float32 [BLOCK_N, BLOCK_K]
    codes    whole numbers [BLOCK_N, BLOCK_K/dim]    sums     float32 [BLOCK_N], one for each row of x

Formulas are those of `reallm.kernels.formats`; an operation names the stored fields it reads and their dtypes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

from reallm.kernels.codecs import DoubleQuant
from reallm.kernels.packing import plane_widths
from reallm.kernels.tables import TableName

Value = Literal["words", "codes", "values", "sums", "stored"]
Read: TypeAlias = tuple[str, str]
"""A stored field and its dtype, as in `kernels.formats.Field`."""


class CodegenError(ValueError):
    """A program that cannot be, or a kernel that cannot be built or called as asked."""


@dataclass(frozen=True, slots=True)
class Project:
    """t[m, r] = scale_r * sum_k R[r, k] x[m, k]: the small half of the low-rank term, float32 [M, rank]."""

    dtype: str

    takes: ClassVar[Value] = "words"
    gives: ClassVar[Value] = "words"

    @property
    def reads(self) -> tuple[Read, ...]:
        scales = (("left_scales", "f16"), ("right_scales", "f16")) if self.dtype == "i8" else ()
        return (("right", self.dtype), *scales)

    def __str__(self) -> str:
        return f"project {self.dtype}"


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
class AddLowRank:
    """sums + L t with t from `Project`."""

    rank: int
    dtype: str

    takes: ClassVar[Value] = "sums"
    gives: ClassVar[Value] = "sums"

    @property
    def reads(self) -> tuple[Read, ...]:
        return (("left", self.dtype),)

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
    Project | Unpack | Levels | Offset | Codebooks | GroupScale | Dot | RowScale | AddLowRank | AddBias | Store
)


def scale_reads(double_quant: DoubleQuant | None) -> tuple[Read, ...]:
    """The fields that hold scales, plain or double-quantised."""
    if double_quant is None:
        return (("scales", "f16"),)
    return (("scale_codes", f"u{double_quant.bits}"), ("scale_ranges", "f16"), ("scale_min", "f32"))


def _double(double_quant: DoubleQuant | None) -> str:
    return f" dq{double_quant.bits}x{double_quant.block}" if double_quant else ""
