"""Codecs: what the codes of a matrix W[N, K] mean, and which fields hold them, to the byte.

Every stored field is a flat run of bytes, zero-padded to ALIGN_BYTES, so sizes add up exactly and no cast by a
framework can change one. A new codec is a frozen dataclass with `name` and `fields`, and one entry in `_PARSERS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Literal, Protocol

from reallm.kernels.codes.packing import aligned, packed_nbytes
from reallm.kernels.codes.tables import TableName

from ..errors import ReallmError

FloatName = Literal["f16", "bf16", "f32"]
FLOAT_NBYTES: dict[str, int] = {"f16": 2, "bf16": 2, "f32": 4, "i8": 1}
SCALAR_BITS = (2, 3, 4, 5, 6, 8)
TILE = 16
"""Rows and columns of a tile of the trellis: 256 weights, as in QTIP."""
MAX_WINDOW_BITS = 16


class FormatError(ReallmError, ValueError):
    """A format that cannot exist, or a name that cannot be read."""


@dataclass(frozen=True, slots=True)
class Field:
    """One stored run of bytes: `count` values of `dtype`.

    "u3" is packed 3-bit codes, "u32" plain words; "f16", "bf16", "f32" and "i8" are themselves.
    """

    name: str
    dtype: str
    count: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file, padding included."""
        if self.dtype == "u32":
            return aligned(4 * self.count)
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

    @property
    def codebook_shape(self) -> tuple[int, ...]:
        return self.num_codebooks, 1 << self.codebook_bits, self.dim

    def codebook_field(self) -> Field:
        """The codebooks, f16 [num_codebooks, 2^codebook_bits, dim]; in the matrix, or once in the model if shared."""
        return Field("codebooks", "f16", self.num_codebooks * (1 << self.codebook_bits) * self.dim)

    def fields(self, rows: int, cols: int) -> tuple[Field, ...]:
        codes = Field("codes", f"u{self.codebook_bits}", rows * self.group_count(cols) * self.num_codebooks)
        scales = Field("scales", "f16", rows)
        return (codes, scales) if self.shared else (codes, scales, self.codebook_field())


@dataclass(frozen=True, slots=True)
class KMeansCodec:
    """One code a weight into the row's own table of 2^bits fp16 levels (SqueezeLLM, arXiv 2306.07629)."""

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4):
            raise FormatError(f"tables of a row take 2, 3 or 4 bits, not {self.bits}")

    @property
    def name(self) -> str:
        return f"km{self.bits}"

    def fields(self, rows: int, cols: int) -> tuple[Field, ...]:
        return (Field("codes", f"u{self.bits}", rows * cols), Field("levels", "f16", rows << self.bits))


@dataclass(frozen=True, slots=True)
class TrellisCodec:
    """Bitshift trellis with a computed code (QTIP, arXiv 2406.11235), its bits shared out among blocks of columns.

    The matrix is cut into tiles of TILE x TILE weights (padded at the edges), each a closed walk of 256 / V steps: the
    tile's bits form a ring, newest bit lowest, and the state of step t of n is the `state_bits` bits of the ring from
    bit k (n - 1 - t) on. A block of columns has `width` half bits a weight: an even width means V = 1 value a step and
    k = width / 2 bits, an odd one V = 2 and k = width. Widths differ from block to block (reverse water-filling) and
    add up to `eighths` eighths of a bit a weight, so the size follows from the name. `scales` has one fp16 a block.
    """

    eighths: int
    state_bits: int

    def __post_init__(self) -> None:
        if not 8 <= self.eighths <= 48 or not 8 <= self.state_bits <= 16:
            raise FormatError(f"a trellis takes 1 to 6 bits in eighths, and 8 to 16 state bits, not {self}")

    @property
    def name(self) -> str:
        return f"tq{self.eighths / 8:g}-l{self.state_bits}"

    def grid(self, rows: int, cols: int) -> tuple[int, int]:
        """Tiles down and across."""
        return -(-rows // TILE), -(-cols // TILE)

    def total_width(self, cols: int) -> int:
        """Half bits of all blocks of columns together, rounded down."""
        return self.eighths * -(-cols // TILE) // 4

    def fields(self, rows: int, cols: int) -> tuple[Field, ...]:
        down, across = self.grid(rows, cols)
        words = down * self.total_width(cols) * (TILE * TILE // 2 // 32)
        return (Field("words", "u32", words), Field("widths", "u4", across), Field("scales", "f16", across))


@dataclass(frozen=True, slots=True)
class LatticeCodec:
    """E8P words for every 8 consecutive entries of a row (QuIP#, arXiv 2402.04396): see `lattice` for the codebooks.

    W_hat = s_b (word(code) + residual scale * second word(residual)), s_b the fp16 scale of a block of TILE columns.
    The second word is one of 2^8 at 3 bits, one of E8P at 4 bits, none at 2. The last word of a row may be cut.
    """

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4):
            raise FormatError(f"a lattice codec takes 2, 3 or 4 bits, not {self.bits}")

    @property
    def name(self) -> str:
        return f"e8p{self.bits}"

    def group_count(self, cols: int) -> int:
        """Words in a row of `cols` weights."""
        return -(-cols // 8)

    def fields(self, rows: int, cols: int) -> tuple[Field, ...]:
        count = rows * self.group_count(cols)
        second = (Field("residuals", "u8" if self.bits == 3 else "u16", count),) if self.bits > 2 else ()
        return (Field("codes", "u16", count), *second, Field("scales", "f16", -(-cols // TILE)))


@dataclass(frozen=True, slots=True)
class NeuralCodec:
    """Latents that a small convolutional decoder, shared by all matrices of a family, makes weights of (ReALLM).

    A column is cut into patches of `dim` rows (the last padded), each with one code into a shared codebook of
    2^codebook_bits words of `dim` weights: the latent image E. Then W_hat = (E + D(E)) times the scale of a block of
    TILE columns, D a convolution over the last `taps` patches of the column, a sine, `layers` - 1 pointwise
    convolutions each with a GELU, and a pointwise one back to the `dim` rows of the patch; `channels` wide. A
    patch is decided by the last `taps` codes: its window. Weights take `weight_bits`, words and biases 8 (`neural`).
    """

    codebook_bits: int
    dim: int
    channels: int
    layers: int
    taps: int
    weight_bits: int

    def __post_init__(self) -> None:
        if not 1 <= self.codebook_bits <= 8 or self.dim not in (1, 2, 4, 8):
            raise FormatError(f"neural codes are 1 to 8 bits for 1, 2, 4 or 8 weights, not {self}")
        if self.taps < 1 or self.window_bits > MAX_WINDOW_BITS:
            raise FormatError(f"a neural decoder sees 1 to {MAX_WINDOW_BITS} bits of codes at once, not {self}")
        if not 1 <= self.channels <= 1024 or not 1 <= self.layers <= 8 or self.weight_bits not in (4, 8):
            raise FormatError(f"a neural decoder has 1 to 1024 channels, 1 to 8 layers, 4 or 8 bits, not {self}")

    @property
    def name(self) -> str:
        decoder = f"c{self.channels}x{self.layers}-t{self.taps}-w{self.weight_bits}"
        return f"nd1x{self.codebook_bits}-d{self.dim}-{decoder}"

    @property
    def window_bits(self) -> int:
        """Bits of the codes that decide one patch."""
        return self.taps * self.codebook_bits

    @property
    def tensors(self) -> tuple[tuple[tuple[int, ...], int], ...]:
        """(shape, bits) of what the shared field holds: words, then weight [out, in] and bias of each layer."""
        ends = [self.taps * self.dim, *[self.channels] * self.layers, self.dim]
        found: list[tuple[tuple[int, ...], int]] = [((1 << self.codebook_bits, self.dim), 8)]
        for inner, outer in pairwise(ends):
            found += [((outer, inner), self.weight_bits), ((outer,), 8)]
        return tuple(found)

    @property
    def codebook_shape(self) -> tuple[int, ...]:
        return (sum(1 + -(-prod(shape) * bits // 8) for shape, bits in self.tensors),)

    def codebook_field(self) -> Field:
        """Codebook and decoder as one run of bytes, see `neural.unpack_tensors`."""
        return Field("codebooks", "u8", *self.codebook_shape)

    def fields(self, rows: int, cols: int) -> tuple[Field, ...]:
        """Codes [patches down, cols] and a scale for each block of columns."""
        codes = Field("codes", f"u{self.codebook_bits}", -(-rows // self.dim) * cols)
        return (codes, Field("scales", "f16", -(-cols // TILE)))


AnyCodec = DenseCodec | ScalarCodec | AdditiveCodec | KMeansCodec | TrellisCodec | LatticeCodec | NeuralCodec


def _parse_dense(match: re.Match[str]) -> DenseCodec:
    names: dict[str, FloatName] = {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}
    return DenseCodec(names[match[0]])


def _parse_scalar(match: re.Match[str]) -> ScalarCodec:
    table: dict[str, TableName] = {"int": "int", "uint": "uint", "nf": "nf", "lm": "lm"}
    double = DoubleQuant(int(match["dq"]), int(match["block"])) if match["dq"] else None
    return ScalarCodec(table[match["table"]], int(match["bits"]), int(match["group"]), double)


def _parse_additive(match: re.Match[str]) -> AdditiveCodec:
    return AdditiveCodec(int(match["m"]), int(match["b"]), int(match["d"]), bool(match["shared"]))


def _parse_kmeans(match: re.Match[str]) -> KMeansCodec:
    return KMeansCodec(int(match["b"]))


def _parse_trellis(match: re.Match[str]) -> TrellisCodec:
    eighths = float(match["rate"]) * 8
    if eighths != int(eighths):
        raise FormatError(f"a trellis takes bits in eighths, not {match['rate']}")
    return TrellisCodec(int(eighths), int(match["l"]))


def _parse_lattice(match: re.Match[str]) -> LatticeCodec:
    return LatticeCodec(int(match["b"]))


def _parse_neural(match: re.Match[str]) -> NeuralCodec:
    return NeuralCodec(*(int(match[part]) for part in ("b", "d", "c", "n", "t", "w")))


_PARSERS: tuple[tuple[str, Callable[[re.Match[str]], AnyCodec]], ...] = (
    (r"bf16|fp16|fp32", _parse_dense),
    (r"(?P<table>u?int|nf|lm)(?P<bits>\d{1,2})-g(?P<group>\d{1,5})(-dq(?P<dq>\d)x(?P<block>\d{1,4}))?", _parse_scalar),
    (r"aq(?P<m>\d)x(?P<b>\d{1,2})-d(?P<d>\d)(?P<shared>-shared)?", _parse_additive),
    (r"km(?P<b>\d)", _parse_kmeans),
    (r"e8p(?P<b>\d)", _parse_lattice),
    (r"tq(?P<rate>\d(\.\d{1,3})?)-l(?P<l>\d{1,2})", _parse_trellis),
    (r"nd1x(?P<b>\d)-d(?P<d>\d)-c(?P<c>\d{1,4})x(?P<n>\d)-t(?P<t>\d{1,2})-w(?P<w>\d)", _parse_neural),
)


def parse_codec(name: str) -> AnyCodec | None:
    """The codec called `name`, None if no pattern fits. Raises FormatError for one that cannot exist."""
    for pattern, build in _PARSERS:
        if match := re.fullmatch(pattern, name):
            return build(match)
    return None
