"""Scales per input channel (AWQ, arXiv 2306.00978): channels with large inputs are coded more finely.

    W x = (W diag(s)) (diag(s)^-1 x),    s_j = size(x_j)^alpha / size(w_j)^beta

s is divided by the root of its largest times its smallest entry. size(x_j) is the root of H_jj, size(w_j) the root mean
square of column j. For each beta, alpha rises over a grid on [0, 1] as long as the codes of W diag(s), rounded without
feedback, get cheaper. alpha = beta = 0 leaves W unchanged, so the search never ends above the cost of no scales. If the
format uses feedback, the codes are compared by the cost that feedback would leave (see `rounding`).
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
"""Upper bound of a scale and of its inverse: both are exact in fp16, and W / scale cannot overflow float32."""


def find_channel_scales(W: Tensor, fmt: Format, work: Workspace) -> Tensor:
    """Find the factors 1 / s by which decoded columns of W[N, K] are multiplied: float32 [K], positive, fp16 values."""
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

    This describes rotated weights and vector codes; `weight` [K] is what a squared error of each column counts.
    """
    return float(scaled.square().sum(dtype=torch.float64) * weight.sum(dtype=torch.float64))
