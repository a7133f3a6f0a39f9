"""The form in which kernels apply a rotation of `kernels.codes.hadamard`: a dense matrix, then a fast transform.

The dense base mixes pieces of the vector; each piece then takes one Walsh-Hadamard transform.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from reallm.kernels.codes.hadamard import factors, sylvester

MAX_PIECE = 8192
"""Entries that one instance transforms in its registers; what is left of a larger power of two goes to the base."""


@cache
def rotation_factors(order: int) -> tuple[NDArray[np.float32], int]:
    """(base [m, m] with the factor 1 / sqrt(order), P) with order = m P, read-only: R = kron(base, S_P) diag(signs)."""
    base, power = factors(order)
    piece = min(power, MAX_PIECE)
    result = (np.kron(base, sylvester(power // piece)) / np.sqrt(order)).astype(np.float32)
    result.setflags(write=False)
    return result, piece
