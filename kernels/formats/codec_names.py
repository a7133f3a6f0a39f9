"""Parsing of codec names."""

from __future__ import annotations

import re
from collections.abc import Callable

from .codecs import (
    DENSE_NAMES,
    AdditiveCodec,
    AnyCodec,
    DenseCodec,
    DoubleQuant,
    KMeansCodec,
    LatticeCodec,
    NeuralCodec,
    ScalarCodec,
    TableName,
    TrellisCodec,
)
from .fields import FormatError


def _parse_dense(match: re.Match[str]) -> DenseCodec:
    return DenseCodec(next(dtype for dtype, name in DENSE_NAMES.items() if name == match[0]))


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
        raise FormatError(f"the bits per weight of a trellis are a multiple of 1/8, not {match['rate']}")
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
    """The codec called `name`, or None when no pattern matches it. Raises FormatError for invalid parameters in it."""
    for pattern, build in _PARSERS:
        if match := re.fullmatch(pattern, name):
            return build(match)
    return None
