"""Formats: how one matrix W[N, K] is stored, to the byte.

    W_hat = T^-1(decode(codes)) + S + L R     (ReALLM, arXiv 2405.13155; LQ-LoRA, 2311.12023; SpQR, 2306.03078)

A Format joins a codec (what the codes mean), transforms of the weight, an optional sparse and an optional low-rank
term, and how the encoder chooses codes; the last changes no byte. Each has a canonical name:

    bf16, fp16, fp32          stored as it is
    int4-g64, uint4-g64       symmetric / asymmetric integers, groups of 64 along the row, fp16 scales
    nf3-g64, lm3-g64          normal-float and Lloyd-Max tables
    nf4-g64-dq8x256           scales themselves in 8 bits, blocks of 256 (LQ-LoRA)
    km3                       a table of 2^3 levels for every row (SqueezeLLM)
    aq2x8-d8                  two additive codebooks of 2^8 words of 8 weights, one fp16 scale a row
    aq2x8-d8-shared           the same, its codebooks shared by every matrix of the same kind and charged once
    tq2.25-l12                trellis of 2^12 states, 2.25 bits a weight shared out among blocks of columns
    e8p2                      E8 lattice words of 8 weights in 16 bits; e8p3 and e8p4 with a residual word (QuIP#)
    nd1x4-d2-c32x1-t3-w8      codes that a convolutional decoder of one hidden layer of 32 channels, shared by every
                              matrix of the same kind and charged once, makes weights of (ReALLM)
    ...+perm, +cs, +rot       the weight is coded with its columns permuted, scaled, both sides rotated
    ...+o5                    5 per mille of the weights kept apart as sparse outliers
    ...+r16, +r16i8, +r16i4   a low-rank term of rank 16, fp16, int8 or int4 factors
    ...+ldl                   codes chosen with error feedback in the metric of the Hessian of the inputs (GPTQ)
    ...+ldl2                  in that of the inputs and of the output's gradients (two-sided; YAQA, arXiv 2505.22988)
    ...+lwc                   clipping learned by gradient descent (OmniQuant)
    ...+svd                   the low-rank term by the plain SVD of what the codes leave (LoftQ, arXiv 2310.08659)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

from .codecs import AdditiveCodec, AnyCodec, DenseCodec, Field, FormatError, NeuralCodec, ScalarCodec, parse_codec
from .terms import MAX_COLS, LowRank, Sparse

Feedback = Literal["", "ldl", "ldl2"]


@dataclass(frozen=True, slots=True)
class Format:
    """How one matrix is stored, and how its codes are chosen."""

    codec: AnyCodec
    low_rank: LowRank | None = None
    feedback: Feedback = ""
    clipping: bool = False
    permuted: bool = False
    channel_scales: bool = False
    rotated: bool = False
    sparse: Sparse | None = None
    plain_svd: bool = False

    def __post_init__(self) -> None:
        modified = self.transformed or self.clipping or self.feedback or self.sparse or self.low_rank
        if isinstance(self.codec, DenseCodec) and modified:
            raise FormatError("a dense format takes no modifier")
        if self.clipping and not isinstance(self.codec, ScalarCodec):
            raise FormatError(f"{self.codec.name} has no clipping to learn; expected a scalar codec before +lwc")
        if self.plain_svd and (self.low_rank is None or self.feedback):
            raise FormatError(
                "+svd is how a low-rank term beside codes without feedback is found; expected +r<rank> too"
            )

    @property
    def transformed(self) -> bool:
        """Whether the codes stand for another matrix than W."""
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

        A shared codebook is not in it; `shared_field` names it and the planner charges it once.
        """
        return sum(field.nbytes for field in self.fields(rows, cols))

    @property
    def shared_field(self) -> Field | None:
        """The field that matrices share, or None."""
        codec = self.codec
        if isinstance(codec, NeuralCodec) or (isinstance(codec, AdditiveCodec) and codec.shared):
            return codec.codebook_field()
        return None

    @property
    def shared_name(self) -> str:
        """Which formats share one field: the codec's name; a decoder for rotated weights is another one."""
        return self.codec.name + ("+rot" if self.rotated and isinstance(self.codec, NeuralCodec) else "")

    @staticmethod
    def parse(name: str) -> Format:
        """Read a canonical name. Raises FormatError with what was found and what was expected."""
        return _parse(name.strip().lower())


_FLAGS = {
    "lwc": "clipping",
    "perm": "permuted",
    "cs": "channel_scales",
    "rot": "rotated",
    "svd": "plain_svd",
}
"""Modifier -> field of Format, in the order of names."""


@cache
def _parse(name: str) -> Format:
    head, *modifiers = name.split("+")
    codec = parse_codec(head)
    if codec is None:
        raise FormatError(f"no format is called {name!r}; expected a name like int4-g64, nf3-g64+ldl or tq2.5-l12+rot")
    found: dict[str, object] = {}
    for modifier in modifiers:
        key, value = _modifier(name, modifier)
        if key in found:
            raise FormatError(f"format {name!r}: {modifier!r} says {key.replace('_', ' ')} twice")
        found[key] = value
    return Format(codec, **found)  # type: ignore[arg-type]  # the keys are field names, each with a value of its type


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
