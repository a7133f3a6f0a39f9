"""Scales per input channel (AWQ, arXiv 2306.00978): channels with large inputs are coded more finely.

    W x = (W diag(s)) (diag(s)^-1 x),    s_j = size(x_j)^alpha / size(w_j)^beta, over the root of (largest x least)

size(x_j) is the root of H_jj, size(w_j) the root mean square of column j. For each beta, alpha rises over a grid on
[0, 1] while the codes of W diag(s) without feedback get cheaper; alpha = beta = 0 leaves W as it is, so scales never
cost more than none. Under feedback H_jj gives way to what feedback leaves of it, in which the codes are judged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reallm.codecs.metric import Workspace
from reallm.codecs.packed_fields import to_half
from reallm.codecs.rounding import RoundingCost
from reallm.kernels.formats.formats import Format

ALPHAS = tuple(i / 10 for i in range(11))
BETAS = (0.0, 0.5)
LARGEST = 2.0**14
"""Of a scale and of its inverse: both are exact in fp16, and W / scale cannot overflow float32."""


def find_channel_scales(W: Tensor, fmt: Format, work: Workspace) -> Tensor:
    """What decoded columns are to be multiplied by, 1 / s, float32 [K], rounded to fp16, positive."""
    judge, inputs, weights = RoundingCost(fmt, work), work.column_weight.sqrt(), W.square().mean(0).sqrt()
    weights, known = torch.where(weights > 0, weights, 1.0), RoundingCost.knows(fmt)
    best, least = torch.ones_like(inputs), float("inf")
    for beta in BETAS:
        before = float("inf")
        for alpha in ALPHAS:
            scales = inputs.pow(alpha) / weights.pow(beta)
            inverse = to_half(((scales.max() * scales.min()).sqrt() / scales).clamp(1 / LARGEST, LARGEST))
            coded, counts = W / inverse, judge.weight * inverse.square()
            found = judge.cost(judge.error(coded, counts) * inverse) if known else _even_cost(coded, counts)
            if found < least:
                best, least = inverse, found
            if found > before:
                break
            before = found
    return best


def _even_cost(coded: Tensor, counts: Tensor) -> float:
    """What codes cost, up to a constant, whose error is spread evenly, as a rotation and vector codes have it."""
    return float(coded.square().sum(dtype=torch.float64) * counts.sum(dtype=torch.float64))
