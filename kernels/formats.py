"""Formats: how one matrix W[N, K] is stored, to the byte.

    W_hat = decode(codes) + L R        (ReALLM, arXiv 2405.13155; LQ-LoRA, arXiv 2311.12023; AQLM, arXiv 2401.06118)

A Format joins a codec (what the codes mean), an optional low-rank term, and whether the encoder feeds errors back
(GPTQ, arXiv 2210.17323); the last changes no byte, only which codes are chosen. Each has a canonical name:

    bf16, fp16, fp32          stored as it is
    int4-g64, uint4-g64       symmetric / asymmetric integers, groups of 64 along the row, fp16 scales
    nf3-g64, lm3-g64          normal-float and Lloyd-Max tables
    nf4-g64-dq8x256           scales themselves in 8 bits, blocks of 256 (LQ-LoRA)
    aq2x8-d8                  two additive codebooks of 2^8 words of 8 weights, one fp16 scale a row
    aq2x8-d8-shared           the same, its codebooks shared by every matrix of the same kind and charged once
    ...+ldl                   error feedback in the metric of the Hessian
    ...+r16, ...+r16i8        a low-rank term of rank 16, fp16 or int8 factors

Every stored field is a flat run of bytes, zero-padded to ALIGN_BYTES, so sizes add up exactly and no cast by a
framework can change one. A new codec is a frozen dataclass with `name` and `fields`, and one entry in `_PARSERS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal, Protocol

from .packing import aligned, packed_nbytes
from .tables import TableName

FloatName = Literal["f16", "bf16", "f32"]
FLOAT_NBYTES: dict[str, int] = {"f16": 2, "bf16": 2, "f32": 4, "i8": 1}
SCALAR_BITS = (2, 3, 4, 5, 6, 8)
MAX_RANK = 1024


class FormatError(ValueError):
    """A format that cannot exist, or a name that cannot be read."""


@dataclass(frozen=True, slots=True)
class Field:
    """One stored run of bytes: `count` values of `dtype` ("u3" is packed 3-bit codes; "f16", "bf16", "f32", "i8")."""

    name: str
    dtype: str
    count: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file, padding included."""
        if self.dtype[0] == "u":
            return packed_nbytes(self.count, int(self.dtype[1:]))
        return aligned(self.count * FLOAT_NBYTES[self.dtype])


class Codec(Protocol):
    """What the codes of a matrix mean and which fields hold them."""

    @property
    def name(self) -> str: ...

    def fields(self, rows: int, cols: int) -> tuple[Field, ...]: ...


@dataclass(frozen=True, slots=True)
class DenseCodec:
    """The weight itself, one float each."""

    dtype: FloatName

    @property
    def name(self) -> str:
        return {"f16": "fp16", "bf16": "bf16", "f32": "fp32"}[self.dtype]

    def fields(self, rows: int, cols: int) -> tuple[Field, ...]:
        return (Field("values", self.dtype, rows * cols),)


@dataclass(frozen=True, slots=True)
class DoubleQuant:
    """Scales in `bits`-bit codes: min + code / (2^bits - 1) * range, one fp16 range per `block` scales (LQ-LoRA)."""

    bits: int
    block: int

    def __post_init__(self) -> None:
        if self.bits not in (4, 6, 8) or not 8 <= self.block <= 4096:
            raise FormatError(f"double quantisation takes 4, 6 or 8 bits and blocks of 8 to 4096, not {self}")


@dataclass(frozen=True, slots=True)
class ScalarCodec:
    """One code a weight: level(code) * scale of its group of `group_size` consecutive entries of a row.

    The last group of a row may be shorter. `group_size` 0 means the whole row.
    """

    table: TableName
    bits: int
    group_size: int
    double_quant: DoubleQuant | None = None

    def __post_init__(self) -> None:
        if self.bits not in SCALAR_BITS:
            raise FormatError(f"a scalar codec takes {SCALAR_BITS} bits, not {self.bits}")
        if self.group_size != 0 and not 8 <= self.group_size <= 65536:
            raise FormatError(f"group_size is 0 (the row) or 8 to 65536, not {self.group_size}")

    @property
    def name(self) -> str:
        scale = f"-dq{self.double_quant.bits}x{self.double_quant.block}" if self.double_quant else ""
        return f"{self.table}{self.bits}-g{self.group_size}{scale}"

    def group_count(self, cols: int) -> int:
        """Groups in a row of `cols` weights."""
        return 1 if self.group_size == 0 else -(-cols // self.group_size)

    def group_width(self, cols: int) -> int:
        """Weights in a full group of a row of `cols` weights."""
        return min(self.group_size or cols, cols)

    def fields(self, rows: int, cols: int) -> tuple[Field, ...]:
        groups = rows * self.group_count(cols)
        fields = [Field("codes", f"u{self.bits}", rows * cols)]
        if self.double_quant is None:
            fields.append(Field("scales", "f16", groups))
        else:
            fields.append(Field("scale_codes", f"u{self.double_quant.bits}", groups))
            fields.append(Field("scale_ranges", "f16", -(-groups // self.double_quant.block)))
            fields.append(Field("scale_min", "f32", 1))
        if self.table == "uint":
            fields.append(Field("zeros", f"u{self.bits}", groups))
        return tuple(fields)


@dataclass(frozen=True, slots=True)
class AdditiveCodec:
    """`num_codebooks` codes for every `dim` consecutive entries of a row; the sum of their words times the row's scale.

    Codes are stored in the order [row, group of `dim`, codebook]; the last group of a row may be cut.
    """

    num_codebooks: int
    codebook_bits: int
    dim: int
    shared: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.num_codebooks <= 4 or not 1 <= self.codebook_bits <= 12 or self.dim not in (2, 4, 8):
            raise FormatError(f"additive codebooks: 1 to 4 of 2^1 to 2^12 words of 2, 4 or 8 weights, not {self}")

    @property
    def name(self) -> str:
        shared = "-shared" if self.shared else ""
        return f"aq{self.num_codebooks}x{self.codebook_bits}-d{self.dim}{shared}"

    def group_count(self, cols: int) -> int:
        return -(-cols // self.dim)

    def codebook_field(self) -> Field:
        """The codebooks, f16 [num_codebooks, 2^codebook_bits, dim]; in the matrix, or once in the model if shared."""
        return Field("codebooks", "f16", self.num_codebooks * (1 << self.codebook_bits) * self.dim)

    def fields(self, rows: int, cols: int) -> tuple[Field, ...]:
        codes = Field("codes", f"u{self.codebook_bits}", rows * self.group_count(cols) * self.num_codebooks)
        scales = Field("scales", "f16", rows)
        return (codes, scales) if self.shared else (codes, scales, self.codebook_field())


@dataclass(frozen=True, slots=True)
class LowRank:
    """Factors L[N, rank] R[rank, K]; int8 ones carry one fp16 scale per component on each side."""

    rank: int
    dtype: Literal["f16", "i8"] = "f16"

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= MAX_RANK:
            raise FormatError(f"rank is 1 to {MAX_RANK}, not {self.rank}")

    @property
    def name(self) -> str:
        return f"r{self.rank}" + ("i8" if self.dtype == "i8" else "")

    def fields(self, rows: int, cols: int) -> tuple[Field, ...]:
        factors = (
            Field("left", self.dtype, rows * self.rank),
            Field("right", self.dtype, self.rank * cols),
        )
        if self.dtype == "f16":
            return factors
        return (*factors, Field("left_scales", "f16", self.rank), Field("right_scales", "f16", self.rank))


@dataclass(frozen=True, slots=True)
class Format:
    """How one matrix is stored, and how its codes are chosen."""

    codec: DenseCodec | ScalarCodec | AdditiveCodec
    low_rank: LowRank | None = None
    feedback: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.codec, DenseCodec) and (self.low_rank or self.feedback):
            raise FormatError("a dense format takes neither a low-rank term nor feedback")

    @property
    def name(self) -> str:
        """Canonical name; `Format.parse(f.name) == f`."""
        parts = [self.codec.name]
        if self.feedback:
            parts.append("ldl")
        if self.low_rank:
            parts.append(self.low_rank.name)
        return "+".join(parts)

    def fields(self, rows: int, cols: int) -> tuple[Field, ...]:
        """Every stored field of a matrix [rows, cols], in file order."""
        fields = self.codec.fields(rows, cols)
        return fields + self.low_rank.fields(rows, cols) if self.low_rank else fields

    def nbytes(self, rows: int, cols: int) -> int:
        """Exact bytes of a matrix [rows, cols] in the file: codes, scales, codebooks, factors, padding.

        A shared codebook is not in it; `shared_field` names it and the planner charges it once.
        """
        return sum(field.nbytes for field in self.fields(rows, cols))

    @property
    def shared_field(self) -> Field | None:
        """The field that matrices share, or None."""
        codec = self.codec
        return codec.codebook_field() if isinstance(codec, AdditiveCodec) and codec.shared else None

    @staticmethod
    def parse(name: str) -> Format:
        """Read a canonical name. Raises FormatError with what was found and what was expected."""
        return _parse(name.strip().lower())


def _parse_dense(match: re.Match[str]) -> DenseCodec:
    names: dict[str, FloatName] = {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}
    return DenseCodec(names[match[0]])


def _parse_scalar(match: re.Match[str]) -> ScalarCodec:
    table: dict[str, TableName] = {"int": "int", "uint": "uint", "nf": "nf", "lm": "lm"}
    double = DoubleQuant(int(match["dq"]), int(match["block"])) if match["dq"] else None
    return ScalarCodec(table[match["table"]], int(match["bits"]), int(match["group"]), double)


def _parse_additive(match: re.Match[str]) -> AdditiveCodec:
    return AdditiveCodec(int(match["m"]), int(match["b"]), int(match["d"]), bool(match["shared"]))


_PARSERS: tuple[tuple[str, Callable[[re.Match[str]], DenseCodec | ScalarCodec | AdditiveCodec]], ...] = (
    (r"bf16|fp16|fp32", _parse_dense),
    (r"(?P<table>u?int|nf|lm)(?P<bits>\d{1,2})-g(?P<group>\d{1,5})(-dq(?P<dq>\d)x(?P<block>\d{1,4}))?", _parse_scalar),
    (r"aq(?P<m>\d)x(?P<b>\d{1,2})-d(?P<d>\d)(?P<shared>-shared)?", _parse_additive),
)


@cache
def _parse(name: str) -> Format:
    head, *modifiers = name.split("+")
    for pattern, build in _PARSERS:
        if match := re.fullmatch(pattern, head):
            codec = build(match)
            break
    else:
        raise FormatError(f"no format is called {name!r}; expected a name like int4-g64, nf3-g64+ldl or aq2x8-d8+r16")
    low_rank, feedback = None, False
    for modifier in modifiers:
        if modifier == "ldl" and not feedback:
            feedback = True
        elif (match := re.fullmatch(r"r(\d{1,4})(i8)?", modifier)) and low_rank is None:
            low_rank = LowRank(int(match[1]), "i8" if match[2] else "f16")
        else:
            raise FormatError(f"format {name!r}: cannot read {modifier!r}; expected +ldl, +r<rank> or +r<rank>i8")
    return Format(codec, low_rank, feedback)
