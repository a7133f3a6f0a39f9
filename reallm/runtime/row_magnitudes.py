"""The magnitudes of a packed matrix's rows, set by a gain on each row (DoRA, arXiv 2402.09353)."""

from __future__ import annotations

import torch
from torch import Tensor

from .packed import Packed

MIN_NORM = 2.0**-100
"""The norm assumed for a row of zeros, which has no direction: its product is 0 whatever its gain is."""


@torch.no_grad()
def row_norms(packed: Packed) -> Tensor:
    """||W_hat||_row without the gain, float32 [rows]."""
    norms: Tensor = torch.linalg.vector_norm(packed.decode_stored(torch.float32), dim=1)
    return norms


def magnitudes(packed: Packed) -> Tensor:
    """m, float32 [rows]: the norms of the rows of W_hat, each with the sign of its gain."""
    norms = row_norms(packed)
    return norms if packed.gain is None else norms * packed.gain


def set_magnitudes(packed: Packed, values: Tensor) -> None:
    """Choose the gain that gives the rows of W_hat the norms `values` [rows].

    Raises ValueError if a gain is not finite.
    """
    gain = values.detach() / row_norms(packed).clamp(min=MIN_NORM)
    if not bool(gain.isfinite().all()):
        raise ValueError("a magnitude is not finite beside the norm of its row")
    packed.set_gain(gain)
