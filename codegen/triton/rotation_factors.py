"""Splits a rotation of `kernels.codes.hadamard` into a small dense matrix, the base, and a fast transform.

A kernel first mixes the pieces of the vector with the base, then applies a Walsh-Hadamard transform to each piece.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from reallm.kernels.codes.hadamard import factors, sylvester

MAX_PIECE = 8192
"""Maximum size of a piece, which one instance transforms in its registers. If the order of a rotation contains a larger
power of two, the rest of this power becomes part of the base."""


@cache
def rotation_factors(order: int) -> tuple[NDArray[np.float32], int]:
    """(base [m, m], P) with order = m P and R = kron(base, S_P) diag(signs).

    S_P is the Sylvester-Hadamard matrix. The base includes the factor 1 / sqrt(order) and is read-only.
    """
    base, power = factors(order)
    piece = min(power, MAX_PIECE)
    result = (np.kron(base, sylvester(power // piece)) / np.sqrt(order)).astype(np.float32)
    result.setflags(write=False)
    return result, piece
