"""Scales per input channel (AWQ, arXiv 2306.00978): channels with large inputs are coded more finely.

    W x = (W diag(s)) (diag(s)^-1 x),    s_j = size(x_j)^alpha / size(w_j)^beta

size(x_j) is the square root of H_jj, and size(w_j) is the root mean square of column j. s is normalised by the square
root of (its largest entry times its smallest). For each beta, alpha rises from 0 to 1 in steps, as long as rounding
W diag(s) without feedback gets cheaper. alpha = beta = 0 leaves W unchanged, so the result never costs more than coding
without channel scales. If the format uses feedback, the costs compared are those that feedback would leave (see
`rounding`).
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
"""Upper bound of a scale and of its inverse. The bound and its inverse are exact in fp16, and W / scale cannot overflow
float32."""


def find_channel_scales(W: Tensor, fmt: Format, work: Workspace) -> Tensor:
    """Find the factors 1 / s that multiply decoded columns of W[N, K]: float32 [K], positive, rounded to fp16."""
    rounding, supported = RoundingCost(fmt, work), RoundingCost.supports(fmt)
    input_size, weight_size = work.column_weight.sqrt(), W.square().mean(0).sqrt()
    weight_size = torch.where(weight_size > 0, weight_size, 1.0)
    best, best_cost = torch.ones_like(input_size), float("inf")
    for beta in BETAS:
        previous_cost = float("inf")
        for alpha in ALPHAS:
            scales = input_size.pow(alpha) / weight_size.pow(beta)
            inverse = to_half(((scales.max() * scales.min()).sqrt() / scales).clamp(1 / LARGEST, LARGEST))
            scaled, weight = W / inverse, rounding.weight * inverse.square()
            cost = rounding.cost(rounding.error(scaled, weight) * inverse) if supported else _even_cost(scaled, weight)
            if cost < best_cost:
                best, best_cost = inverse, cost
            if cost > previous_cost:
                break
            previous_cost = cost
    return best


def _even_cost(scaled: Tensor, weight: Tensor) -> float:
    """The cost, up to a constant factor, of codes whose error is spread evenly over the columns of `scaled` [N, K].

    This is the case for rotated weights and for vector codes. `weight` [K] is the cost of a squared error in each
    column.
    """
    return float(scaled.square().sum(dtype=torch.float64) * weight.sum(dtype=torch.float64))
