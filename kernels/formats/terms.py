"""What a format may add to the codes of a matrix: transforms of the weight, sparse outliers, a low-rank term.

    W_hat = T^-1(decode(codes)) + S + L R

T^-1 undoes the transforms that the format has, in this order: a rotation of both sides (`codes.hadamard`; QuIP#, arXiv
2402.04396), a permutation of the columns (ReALLM, arXiv 2405.13155), a scale per column (AWQ, arXiv 2306.00978).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .fields import Field, FormatError

MAX_RANK = 1024
MAX_PERMILLE = 200
MAX_COLS = 1 << 16
"""Column indices are stored as 16-bit numbers."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """Factors L[N, rank] R[rank, K]; int8 and int4 factors have one fp16 scale per component on each side.

    An int4 factor is stored as 4-bit codes, each the value plus 8.
    """

    rank: int
    dtype: Literal["f16", "i8", "i4"] = "f16"

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= MAX_RANK:
            raise FormatError(f"rank is 1 to {MAX_RANK}, not {self.rank}")

    @property
    def largest_code(self) -> int:
        """Largest value of an integer factor; the smallest is its negative. 0 for fp16 factors."""
        return {"f16": 0, "i8": 127, "i4": 7}[self.dtype]

    @property
    def offset(self) -> int:
        """What is added to a value to get its stored code."""
        return 8 if self.dtype == "i4" else 0

    @property
    def name(self) -> str:
        """How a format's name spells the term."""
        return f"r{self.rank}" + ("" if self.dtype == "f16" else self.dtype)

    def fields(self, rows: int, cols: int) -> tuple[Field, ...]:
        """The stored fields of the term for a matrix [rows, cols]."""
        stored = "u4" if self.dtype == "i4" else self.dtype
        factors = (Field("left", stored, rows * self.rank), Field("right", stored, self.rank * cols))
        if self.dtype == "f16":
            return factors
        return (*factors, Field("left_scales", "f16", self.rank), Field("right_scales", "f16", self.rank))


@dataclass(frozen=True, slots=True)
class Sparse:
    """The most important `permille` thousandths of the weights, stored separately in fp16 (SpQR, arXiv 2306.03078).

    The fields are the number of outliers in each row, then, row by row, their columns in ascending order, and the
    values that are added to the decoded weights.
    """

    permille: int

    def __post_init__(self) -> None:
        if not 1 <= self.permille <= MAX_PERMILLE:
            raise FormatError(f"sparse outliers are 1 to {MAX_PERMILLE} per mille of the weights, not {self.permille}")

    @property
    def name(self) -> str:
        """How a format's name spells the term."""
        return f"o{self.permille}"

    def count(self, rows: int, cols: int) -> int:
        """Number of outliers in a matrix [rows, cols], at least one."""
        return max(1, rows * cols * self.permille // 1000)

    def fields(self, rows: int, cols: int) -> tuple[Field, ...]:
        """The stored fields of the term for a matrix [rows, cols]."""
        count = self.count(rows, cols)
        return (
            Field("sparse_counts", "u16", rows),
            Field("sparse_cols", "u16", count),
            Field("sparse_values", "f16", count),
        )
