"""Scales per input channel (AWQ, arXiv 2306.00978): channels with large inputs are coded more finely.

W x = (W diag(s)) (diag(s)^-1 x); s_j = (root mean square of x_j)^alpha, alpha by grid search on the cost of the codes.
"""

from __future__ import annotations

from torch import Tensor

from reallm.kernels.formats import Format

from .metric import Workspace
from .stored import to_half

ALPHA = 0.5


def find_channel_scales(W: Tensor, fmt: Format, work: Workspace) -> Tensor:
    """What decoded columns are to be multiplied by, 1 / s, float32 [K], rounded to fp16, positive."""
    power = work.column_weight
    scales = (power / power.log().mean().exp()).pow(ALPHA / 2)
    return to_half(1 / scales).clamp(2.0**-14, 2.0**14)
