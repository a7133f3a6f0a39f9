"""What is encoded first when only the candidates that a plan needs are measured.

Every matrix is encoded once, in the format nearest to the budget. A few matrices, which together hold SAMPLED_SHARE of
the weights of their kind, are encoded in all their formats: they show how the costs of the formats relate.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from math import log

from reallm.kernels.formats.formats import Format
from reallm.models.matrix import Matrix

SAMPLED_SHARE = 0.015
"""Fifteen formats of this share take a quarter of the time of encoding the model once."""
FEW = 4
"""A kind with fewer matrices than this, such as embeddings, is encoded in all its formats."""

Formats = Mapping[str, Sequence[Format]]


def first_candidates(matrices: Sequence[Matrix], formats: Formats, bits: float) -> dict[str, list[Format]]:
    """The formats in which each of `matrices` is encoded first, by name; `bits` is the budget in bits per weight."""
    sampled = {matrix.name for matrix in _sample(matrices)}
    return {m.name: [*formats[m.name]] if m.name in sampled else _nearest(m, formats[m.name], bits) for m in matrices}


def _nearest(matrix: Matrix, formats: Sequence[Format], bits: float) -> list[Format]:
    """The format nearest to `bits` among those of the most frequent codec; none if there is no format."""
    codecs = Counter(type(fmt.codec) for fmt in formats)
    usual = [fmt for fmt in formats if codecs[type(fmt.codec)] == max(codecs.values())]

    def distance(fmt: Format) -> float:
        return abs(log(8 * fmt.nbytes(matrix.rows, matrix.cols) / matrix.numel / bits))

    return [min(usual, key=distance)] if usual else []


def _sample(matrices: Sequence[Matrix]) -> list[Matrix]:
    """For every kind, the middle matrices of its families, the smallest family first, within SAMPLED_SHARE."""
    kinds: dict[str, list[Matrix]] = defaultdict(list)
    for matrix in matrices:
        kinds[matrix.kind].append(matrix)
    result = []
    for members in kinds.values():
        families: dict[str, list[Matrix]] = defaultdict(list)
        for matrix in members:
            families[matrix.family].append(matrix)
        middle = sorted((family[len(family) // 2] for family in families.values()), key=lambda m: m.numel)
        room = SAMPLED_SHARE * sum(matrix.numel for matrix in members)
        for number, matrix in enumerate(middle):
            room -= matrix.numel
            if room >= 0 or number == 0:
                result.append(matrix)
        if len(members) < FEW:
            result += members
    return result
