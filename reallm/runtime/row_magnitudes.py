"""The magnitudes of a packed matrix's rows, set by a gain on each row (DoRA, arXiv 2402.09353)."""

from __future__ import annotations

import torch
from torch import Tensor

from .packed import Packed

MIN_NORM = 2.0**-100
"""The norm assumed for a row of zeros, which has no direction: its product is 0 whatever its gain is."""


@torch.no_grad()
def row_norms(packed: Packed) -> Tensor:
    """The L2 norm of each row of W_hat without the gain, float32 [rows]."""
    norms: Tensor = torch.linalg.vector_norm(packed.decode_stored(torch.float32), dim=1)
    return norms


def magnitudes(packed: Packed) -> Tensor:
    """The magnitudes m, float32 [rows]: the L2 norm of each row of W_hat with its gain, times the sign of the gain."""
    norms = row_norms(packed)
    return norms if packed.gain is None else norms * packed.gain


def set_magnitudes(packed: Packed, values: Tensor) -> None:
    """Set the gain for which the rows of W_hat have the magnitudes `values` [rows].

    Raises ValueError if a gain is not finite.
    """
    gain = values.detach() / row_norms(packed).clamp(min=MIN_NORM)
    if not bool(gain.isfinite().all()):
        raise ValueError("a magnitude divided by the norm of its row is not finite")
    packed.set_gain(gain)
