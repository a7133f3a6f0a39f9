"""Scales per input channel (AWQ, arXiv 2306.00978): channels with large inputs are coded more finely.

    W x = (W diag(s)) (diag(s)^-1 x),    s_j = size(x_j)^alpha / size(w_j)^beta, over the root of the largest by the least

size(x_j) is the root of H_jj, size(w_j) the root mean square of column j. For each beta, alpha rises over a grid on
[0, 1] while the codes of W diag(s) without feedback get cheaper; alpha = beta = 0 leaves W as it is, so scales never
cost more than none. Under feedback H_jj gives way to what feedback leaves of it, in which the codes are judged.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reallm.kernels.codecs import KMeansCodec, ScalarCodec
from reallm.kernels.formats import Format

from .kmeans import round_kmeans
from .metric import Workspace
from .scalar import round_scalar
from .stored import to_half

ALPHAS = tuple(i / 10 for i in range(11))
BETAS = (0.0, 0.5)
LARGEST = 2.0**14
"""Of a scale and of its inverse: both are exact in fp16, and W / scale cannot overflow float32."""


def find_channel_scales(W: Tensor, fmt: Format, work: Workspace) -> Tensor:
    """What decoded columns are to be multiplied by, 1 / s, float32 [K], rounded to fp16, positive."""
    inputs, weights, cost = work.column_weight.sqrt(), W.square().mean(0).sqrt(), _judge(W, fmt, work)
    weights = torch.where(weights > 0, weights, 1.0)
    best, least = torch.ones_like(inputs), float("inf")
    for beta in BETAS:
        before = float("inf")
        for alpha in ALPHAS:
            scales = inputs.pow(alpha) / weights.pow(beta)
            inverse = to_half(((scales.max() * scales.min()).sqrt() / scales).clamp(1 / LARGEST, LARGEST))
            found = cost(inverse)
            if found < least:
                best, least = inverse, found
            if found > before:
                break
            before = found
    return best


def _judge(W: Tensor, fmt: Format, work: Workspace) -> Callable[[Tensor], float]:
    """The cost of coding W diag(1 / inverse).

    Codes whose error is spread evenly over the coded matrix, as a rotation and vector codes have it, cost the power of
    what is coded times the sum of the weights of its columns, up to a constant.
    """
    codec, weight = fmt.codec, work.feedback_weight if fmt.feedback else work.column_weight

    def of_rounding(inverse: Tensor) -> float:
        coded, counts = W / inverse, weight * inverse.square()
        if isinstance(codec, KMeansCodec):
            decoded = round_kmeans(coded, codec, counts).values
        else:
            assert isinstance(codec, ScalarCodec)
            decoded = round_scalar(coded, codec, counts).values(codec)
        error = W - decoded * inverse
        weighted = error * weight if fmt.feedback else error @ work.hessian32
        return float((weighted * error).sum(dtype=torch.float64))

    def of_even_errors(inverse: Tensor) -> float:
        power = (W / inverse).square().sum(dtype=torch.float64)
        return float(power * (weight * inverse.square()).sum(dtype=torch.float64))

    return of_rounding if isinstance(codec, ScalarCodec | KMeansCodec) and not fmt.rotated else of_even_errors
