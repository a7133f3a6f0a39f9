"""Tables of scalar codecs: the levels that b-bit codes select, scaled so that the largest magnitude is one.

- `int`  symmetric integers, (q - 2^(b-1)) / 2^(b-1).
- `nf`   NormalFloat: quantiles of the normal distribution with an exact zero (QLoRA, arXiv 2305.14314, generalised to
         b bits in LQ-LoRA, arXiv 2311.12023).
- `lm`   the Lloyd-Max quantiser of the normal distribution (Max 1960, Lloyd 1982): the least squared error with b bits.

Tables are computed in float64 with the standard library and rounded once to float32, so they are the same on every
machine.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from reallm.kernels.formats.codecs import TableName

NF_OFFSET = 0.9677083  # probability of the outermost quantile (QLoRA)
LLOYD_ITERATIONS = 2000
_NORMAL = NormalDist()


def _normal_float(bits: int) -> list[float]:
    half = 2 ** (bits - 1)
    right = [_NORMAL.inv_cdf(NF_OFFSET + (0.5 - NF_OFFSET) * i / half) for i in range(half)]
    left = [-_NORMAL.inv_cdf(NF_OFFSET + (0.5 - NF_OFFSET) * i / (half - 1)) for i in range(half - 1)]
    levels = sorted([*left, 0.0, *right])
    return [v / max(levels) for v in levels]


def _lloyd_max(bits: int) -> list[float]:
    """Levels that are each the mean of their cell under the standard normal density, by fixed-point iteration."""
    count = 2**bits
    half = [_NORMAL.inv_cdf(0.5 + 0.5 * (i + 0.5) / (count // 2)) for i in range(count // 2)]
    for _ in range(LLOYD_ITERATIONS):
        edges = [0.0, *((a + b) / 2 for a, b in pairwise(half)), float("inf")]
        moved = [
            (_NORMAL.pdf(a) - (0.0 if b == float("inf") else _NORMAL.pdf(b)))
            / ((1.0 if b == float("inf") else _NORMAL.cdf(b)) - _NORMAL.cdf(a))
            for a, b in pairwise(edges)
        ]
        change = max(abs(a - b) for a, b in zip(half, moved, strict=True))
        half = moved
        if change < 1e-12:
            break
    top = half[-1]
    return [-v / top for v in reversed(half)] + [v / top for v in half]


@cache
def table(name: TableName, bits: int) -> NDArray[np.float32]:
    """Levels of `name` in increasing order, float32 [2^bits], read-only.

    The levels of `uint` are the codes themselves; decoding subtracts the zero point of the group.
    """
    if name == "nf":
        levels = _normal_float(bits)
    elif name == "lm":
        levels = _lloyd_max(bits)
    elif name == "int":
        half = 2 ** (bits - 1)
        levels = [(q - half) / half for q in range(2 * half)]
    else:
        levels = [float(q) for q in range(2**bits)]
    result = np.asarray(levels, dtype=np.float32)
    result.setflags(write=False)
    return result
