"""Codecs: what the codes of a matrix W[N, K] mean, which fields hold them, and the exact sizes of these.

To add a codec, write a frozen dataclass that extends `Codec` here, its name pattern in `codec_names`, and its decoder
in `reference`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Literal

from reallm.kernels.storage.dtypes import FloatName

from .fields import Field, FormatError

TableName = Literal["int", "uint", "nf", "lm"]
"""Names of the level tables in `codes.tables`."""
DENSE_NAMES: dict[FloatName, str] = {"f16": "fp16", "bf16": "bf16", "f32": "fp32"}
"""The format names of uncompressed matrices, by element type."""
SCALAR_BITS = (2, 3, 4, 5, 6, 8)
TILE = 16
"""Number of rows and of columns of a trellis tile, which holds 16 * 16 = 256 weights as in QTIP."""
MAX_WINDOW_BITS = 16


class Codec(ABC):
    """What the codes of a matrix mean and which fields hold them."""

    __slots__ = ()

    @property
    @abstractmethod
    def name(self) -> str:
        """Canonical name, the first part of a format's name."""

    @abstractmethod
    def fields(self, rows: int, cols: int) -> tuple[Field, ...]:
        """The stored fields of a matrix [rows, cols], in file order."""

    @property
    def shared_field(self) -> Field | None:
        """The field that several matrices share and that is stored once in the model, or None."""
        return None


@dataclass(frozen=True, slots=True)
class DenseCodec(Codec):
    """Uncompressed weights, one float each."""

    dtype: FloatName

    @property
    def name(self) -> str:
        return DENSE_NAMES[self.dtype]

    def fields(self, rows: int, cols: int) -> tuple[Field, ...]:
        return (Field("values", self.dtype, rows * cols),)


@dataclass(frozen=True, slots=True)
class DoubleQuant:
    """Scales stored as codes (LQ-LoRA): min + code / (2^bits - 1) * range, with one fp16 range per `block` scales."""

    bits: int
    block: int

    def __post_init__(self) -> None:
        if self.bits not in (4, 6, 8) or not 8 <= self.block <= 4096:
            raise FormatError(f"double quantisation takes 4, 6 or 8 bits and blocks of 8 to 4096, not {self}")


@dataclass(frozen=True, slots=True)
class ScalarCodec(Codec):
    """One code per weight. A weight is level(code) times the scale of its group of `group_size` weights along a row.

    The last group of a row may be shorter. A `group_size` of 0 means the whole row.
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
        """Number of groups in a row of `cols` weights."""
        return 1 if self.group_size == 0 else -(-cols // self.group_size)

    def group_width(self, cols: int) -> int:
        """Number of weights in a full group of a row of `cols` weights."""
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
class AdditiveCodec(Codec):
    """Each `dim` consecutive weights of a row are the sum of `num_codebooks` words, one per code, times the row scale.

    Codes are stored in the order [row, group of `dim`, codebook]; the last group of a row may be incomplete.
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
        """Number of groups of `dim` weights in a row of `cols` weights."""
        return -(-cols // self.dim)

    @property
    def codebook_shape(self) -> tuple[int, ...]:
        """[num_codebooks, 2^codebook_bits, dim]."""
        return self.num_codebooks, 1 << self.codebook_bits, self.dim

    def codebook_field(self) -> Field:
        """The codebooks, f16 [num_codebooks, 2^codebook_bits, dim]: one field per matrix, or per model if shared."""
        return Field("codebooks", "f16", self.num_codebooks * (1 << self.codebook_bits) * self.dim)

    @property
    def shared_field(self) -> Field | None:
        return self.codebook_field() if self.shared else None

    def fields(self, rows: int, cols: int) -> tuple[Field, ...]:
        codes = Field("codes", f"u{self.codebook_bits}", rows * self.group_count(cols) * self.num_codebooks)
        scales = Field("scales", "f16", rows)
        return (codes, scales) if self.shared else (codes, scales, self.codebook_field())


@dataclass(frozen=True, slots=True)
class KMeansCodec(Codec):
    """One code per weight, an index into the row's own table of 2^bits fp16 levels (SqueezeLLM, arXiv 2306.07629)."""

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4):
            raise FormatError(f"the table of a row has 2, 3 or 4 bits, not {self.bits}")

    @property
    def name(self) -> str:
        return f"km{self.bits}"

    def fields(self, rows: int, cols: int) -> tuple[Field, ...]:
        return (Field("codes", f"u{self.bits}", rows * cols), Field("levels", "f16", rows << self.bits))


@dataclass(frozen=True, slots=True)
class TrellisCodec(Codec):
    """Bitshift trellis with a computed code (QTIP, arXiv 2406.11235), with bits distributed over blocks of columns.

    The matrix is cut into tiles of TILE x TILE weights (padded at the edges). A tile is a closed walk of n = 256 / V
    steps: its bits form a ring, newest bit lowest, and the state of step t is the `state_bits` bits of the ring that
    start at bit k (n - 1 - t). A block of columns has `width` half bits per weight: an even width means V = 1 value per
    step and k = width / 2 bits, an odd one V = 2 and k = width. Widths differ from block to block (reverse
    water-filling) and average to `eighths` eighths of a bit per weight, so the name determines the size. `scales` holds
    one fp16 number per block.
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
        """Number of tiles (down, across) of a matrix [rows, cols]."""
        return -(-rows // TILE), -(-cols // TILE)

    def total_width(self, cols: int) -> int:
        """Sum of the widths of all blocks of columns, in half bits, rounded down."""
        return self.eighths * -(-cols // TILE) // 4

    def fields(self, rows: int, cols: int) -> tuple[Field, ...]:
        down, across = self.grid(rows, cols)
        words = down * self.total_width(cols) * (TILE * TILE // 2 // 32)
        return (Field("words", "u32", words), Field("widths", "u4", across), Field("scales", "f16", across))


@dataclass(frozen=True, slots=True)
class LatticeCodec(Codec):
    """E8P words for every 8 consecutive entries of a row (QuIP#, arXiv 2402.04396); `codes.lattice` has the codebooks.

    W_hat = s_b (word(code) + residual scale * second word(residual)), with s_b the fp16 scale of a block of TILE
    columns. The second word is one of 2^8 words at 3 bits, a word of E8P at 4 bits, and absent at 2 bits. The last word
    of a row may be incomplete.
    """

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4):
            raise FormatError(f"a lattice codec takes 2, 3 or 4 bits, not {self.bits}")

    @property
    def name(self) -> str:
        return f"e8p{self.bits}"

    def group_count(self, cols: int) -> int:
        """Number of words in a row of `cols` weights."""
        return -(-cols // 8)

    def fields(self, rows: int, cols: int) -> tuple[Field, ...]:
        count = rows * self.group_count(cols)
        second = (Field("residuals", "u8" if self.bits == 3 else "u16", count),) if self.bits > 2 else ()
        return (Field("codes", "u16", count), *second, Field("scales", "f16", -(-cols // TILE)))


@dataclass(frozen=True, slots=True)
class NeuralCodec(Codec):
    """Latent codes that a small convolutional decoder, shared by the matrices of a family, turns into weights (ReALLM).

    A column is cut into patches of `dim` rows (the last padded). Each patch has one code, an index into a shared
    codebook of 2^codebook_bits words of `dim` weights; together they are the latent image E. Then W_hat = (E + D(E))
    times the scale of a block of TILE columns, where D is a convolution over the last `taps` patches of the column, a
    sine, `layers` - 1 pointwise convolutions each with a GELU, and a pointwise convolution back to the `dim` rows of
    the patch; the hidden layers have `channels` channels. A patch depends on the last `taps` codes, its window. Decoder
    weights are stored in `weight_bits` bits, words and biases in 8 (`codes.neural`).
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
        """Bits of the codes that determine one patch."""
        return self.taps * self.codebook_bits

    @property
    def tensors(self) -> tuple[tuple[tuple[int, ...], int], ...]:
        """(shape, bits) of each tensor in the shared field: the words, then weight [out, in] and bias of each layer."""
        widths = [self.taps * self.dim, *[self.channels] * self.layers, self.dim]
        tensors: list[tuple[tuple[int, ...], int]] = [((1 << self.codebook_bits, self.dim), 8)]
        for inputs, outputs in pairwise(widths):
            tensors += [((outputs, inputs), self.weight_bits), ((outputs,), 8)]
        return tuple(tensors)

    @property
    def codebook_shape(self) -> tuple[int, ...]:
        """(n,), where n is the number of bytes of the shared field without padding."""
        return (sum(1 + -(-prod(shape) * bits // 8) for shape, bits in self.tensors),)

    def codebook_field(self) -> Field:
        """Codebook and decoder as one run of bytes; `codes.neural.unpack_tensors` reads it."""
        return Field("codebooks", "u8", *self.codebook_shape)

    @property
    def shared_field(self) -> Field:
        return self.codebook_field()

    def fields(self, rows: int, cols: int) -> tuple[Field, ...]:
        """Codes [patches down, cols] and one scale per block of columns."""
        codes = Field("codes", f"u{self.codebook_bits}", -(-rows // self.dim) * cols)
        return (codes, Field("scales", "f16", -(-cols // TILE)))


AnyCodec = DenseCodec | ScalarCodec | AdditiveCodec | KMeansCodec | TrellisCodec | LatticeCodec | NeuralCodec
