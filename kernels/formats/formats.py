"""Formats: how one matrix W[N, K] is stored, to the byte.

    W_hat = T^-1(decode(codes)) + S + L R     (ReALLM, arXiv 2405.13155; LQ-LoRA, 2311.12023; SpQR, 2306.03078)

A Format combines a codec (what the codes mean), transforms of the weight, an optional sparse and an optional low-rank
term, and the way the encoder chooses codes, which does not affect the size. Each format has a canonical name:

    bf16, fp16, fp32          uncompressed
    int4-g64, uint4-g64       symmetric / asymmetric integers, groups of 64 along the row, fp16 scales
    nf3-g64, lm3-g64          normal-float and Lloyd-Max tables
    nf4-g64-dq8x256           the scales too are quantised, to 8 bits in blocks of 256 (LQ-LoRA)
    km3                       a table of 2^3 levels for every row (SqueezeLLM)
    aq2x8-d8                  two additive codebooks of 2^8 words of 8 weights, one fp16 scale per row
    aq2x8-d8-shared           the same with codebooks that all matrices of a family share; their bytes count once
    tq2.25-l12                trellis of 2^12 states, 2.25 bits per weight distributed over blocks of columns
    e8p2                      E8 lattice words of 8 weights in 16 bits; e8p3 and e8p4 with a residual word (QuIP#)
    nd1x4-d2-c32x1-t3-w8      codes that a convolutional decoder, here with one hidden layer of 32 channels, turns into
                              weights; all matrices of a family share it, and its bytes count once (ReALLM)
    ...+perm, +cs, +rot       the columns are permuted, the columns are scaled, both sides are rotated before coding
    ...+o5                    5 per mille of the weights are stored separately as sparse outliers
    ...+r16, +r16i8, +r16i4   a low-rank term of rank 16, fp16, int8 or int4 factors
    ...+ldl                   codes chosen with error feedback in the metric of the Hessian of the inputs (GPTQ)
    ...+ldl2                  the same in the metric of inputs and output gradients (two-sided; YAQA, arXiv 2505.22988)
    ...+lwc                   clipping learned by gradient descent (OmniQuant)
    ...+svd                   the low-rank term is the plain SVD of the coding error (LoftQ, arXiv 2310.08659)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

from .codec_names import parse_codec
from .codecs import AnyCodec, DenseCodec, NeuralCodec, ScalarCodec
from .fields import Field, FormatError
from .terms import MAX_COLS, LowRank, Sparse

Feedback = Literal["", "ldl", "ldl2"]


@dataclass(frozen=True, slots=True)
class Format:
    """How one matrix is stored, and how its codes are chosen.

    >>> fmt = reallm.Format.parse("int4-g64")
    >>> fmt.nbytes(rows=8, cols=64), fmt.name
    (320, 'int4-g64')
    """

    codec: AnyCodec
    low_rank: LowRank | None = None
    feedback: Feedback = ""
    """Error feedback while codes are chosen: none, "ldl" (metric of the inputs) or "ldl2" (two-sided)."""
    clipping: bool = False
    """Whether the ranges of groups are learned by gradient descent."""
    permuted: bool = False
    channel_scales: bool = False
    rotated: bool = False
    sparse: Sparse | None = None
    plain_svd: bool = False
    """Whether the low-rank term is the plain, unweighted SVD of the coding error."""

    def __post_init__(self) -> None:
        modified = self.transformed or self.clipping or self.feedback or self.sparse or self.low_rank
        if isinstance(self.codec, DenseCodec) and modified:
            raise FormatError("a dense format cannot have modifiers; expected bf16, fp16 or fp32 alone")
        if self.clipping and not isinstance(self.codec, ScalarCodec):
            raise FormatError(
                f"{self.codec.name} has no clipping that could be learned; expected a scalar codec before +lwc"
            )
        if self.plain_svd and (self.low_rank is None or self.feedback):
            raise FormatError(
                "+svd applies to a low-rank term beside codes chosen without feedback; expected +r<rank>, without +ldl"
            )

    @property
    def transformed(self) -> bool:
        """Whether the codes represent a transformed matrix instead of W itself."""
        return self.permuted or self.channel_scales or self.rotated

    @property
    def name(self) -> str:
        """Canonical name; `Format.parse(f.name) == f`."""
        flags = (name for name, field in _FLAGS.items() if getattr(self, field))
        parts = [self.codec.name, self.feedback, *flags]
        parts += [term.name for term in (self.sparse, self.low_rank) if term]
        return "+".join(part for part in parts if part)

    def fields(self, rows: int, cols: int) -> tuple[Field, ...]:
        """Every stored field of a matrix [rows, cols], in file order. Raises FormatError for too many columns."""
        fields = self.codec.fields(rows, cols)
        if (self.permuted or self.sparse) and cols > MAX_COLS:
            raise FormatError(f"{self.name} stores columns in 16 bits; a matrix of {cols} columns has too many")
        if self.permuted:
            fields += (Field("permutation", "u16", cols),)
        if self.channel_scales:
            fields += (Field("channel_scales", "f16", cols),)
        for term in (self.sparse, self.low_rank):
            fields += term.fields(rows, cols) if term else ()
        return fields

    def nbytes(self, rows: int, cols: int) -> int:
        """Exact bytes of a matrix [rows, cols] in the file: codes, scales, codebooks, factors, padding.

        A shared codebook is not included; `shared_field` describes it, and the planner counts it once.
        """
        return sum(field.nbytes for field in self.fields(rows, cols))

    @property
    def shared_field(self) -> Field | None:
        """The field that several matrices share, or None."""
        return self.codec.shared_field

    @property
    def shared_name(self) -> str:
        """Name under which the shared field is kept: formats with equal names use the same field.

        It includes "+rot" for neural decoders only, because those for rotated and for plain weights are different.
        """
        return self.codec.name + ("+rot" if self.rotated and isinstance(self.codec, NeuralCodec) else "")

    @staticmethod
    def parse(name: str) -> Format:
        """The format with this canonical name. Raises FormatError for a name that cannot be read."""
        return _parse(name.strip().lower())


_FLAGS = {
    "lwc": "clipping",
    "perm": "permuted",
    "cs": "channel_scales",
    "rot": "rotated",
    "svd": "plain_svd",
}
"""Modifier -> field of Format, in the order in which names list them."""


@cache
def _parse(name: str) -> Format:
    head, *modifiers = name.split("+")
    codec = parse_codec(head)
    if codec is None:
        raise FormatError(f"unknown format {name!r}; expected a name like int4-g64, nf3-g64+ldl or tq2.5-l12+rot")
    modified: dict[str, object] = {}
    for modifier in modifiers:
        key, value = _modifier(name, modifier)
        if key in modified:
            raise FormatError(f"format {name!r}: {modifier!r} sets {key.replace('_', ' ')} a second time; name it once")
        modified[key] = value
    return Format(codec, **modified)  # type: ignore[arg-type]  # the keys are field names, the values have their types


def _modifier(name: str, modifier: str) -> tuple[str, object]:
    """(field of Format, value) of one modifier."""
    if modifier in ("ldl", "ldl2"):
        return "feedback", modifier
    if modifier in _FLAGS:
        return _FLAGS[modifier], True
    if match := re.fullmatch(r"r(\d{1,4})(i8|i4)?", modifier):
        return "low_rank", LowRank(int(match[1]), match[2] or "f16")  # type: ignore[arg-type]
    if match := re.fullmatch(r"o(\d{1,3})", modifier):
        return "sparse", Sparse(int(match[1]))
    expected = "+ldl, +ldl2, +lwc, +perm, +cs, +rot, +svd, +o<per mille>, +r<rank>, +r<rank>i8 or +r<rank>i4"
    raise FormatError(f"format {name!r}: cannot read {modifier!r}; expected {expected}")
