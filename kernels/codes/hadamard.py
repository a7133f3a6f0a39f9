"""Orthogonal matrices of any order with entries of nearly equal magnitude: they make weights look Gaussian.

    R = kron(B, S) diag(signs) / sqrt(n),   n = m 2^a,   S the Sylvester-Hadamard matrix of order 2^a

B is [1] when n is a power of two. Otherwise it is the smallest Hadamard matrix of order m = p 2^j <= MAX_PALEY_ORDER
that Paley's constructions give for the odd part p of n (Paley 1933: order q + 1 for a prime q = 3 mod 4, order
2 (q + 1) for a prime q = 1 mod 4). If there is none, it is the discrete Hartley matrix cas(2 pi i j / p), which is
orthogonal for every p and has no entry above sqrt(2). Entries of R are thus at most sqrt(2 / n): the incoherence of
QuIP (arXiv 2307.13304) and QuIP# (arXiv 2402.04396) in any dimension. The signs come from a fixed generator, so R
depends on n alone, and matrices that share an input share R.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MAX_PALEY_ORDER = 512
"""Largest order of B, which is applied as a dense matrix."""


def is_prime(q: int) -> bool:
    """Whether `q` is prime, by trial division (q is small here)."""
    return q > 1 and all(q % d for d in range(2, int(q**0.5) + 1))


def _jacobsthal(q: int) -> Array:
    """chi(i - j), [q, q], with chi the quadratic character modulo a prime q."""
    character = np.full(q, -1.0)
    character[[i * i % q for i in range(q)]] = 1
    character[0] = 0
    index = np.arange(q)
    result: Array = character[(index[:, None] - index[None, :]) % q]
    return result


def _bordered(q: int, corner: float) -> Array:
    """[[0, 1], [corner, chi]] of order q + 1."""
    result = np.zeros((q + 1, q + 1))
    result[0, 1:], result[1:, 0], result[1:, 1:] = 1, corner, _jacobsthal(q)
    return result


def paley(order: int) -> Array | None:
    """A Hadamard matrix of `order` by one of Paley's constructions over a prime field, or None if neither applies."""
    if order % 4 == 0 and is_prime(order - 1):  # order - 1 = 3 mod 4: a skew conference matrix
        return np.eye(order) + _bordered(order - 1, -1)
    half = order // 2
    if order % 4 == 0 and half % 2 == 0 and (half - 1) % 4 == 1 and is_prime(half - 1):  # a symmetric one
        plus, minus = np.array([[1.0, 1], [1, -1]]), np.array([[1.0, -1], [-1, -1]])
        return np.kron(_bordered(half - 1, 1), plus) + np.kron(np.eye(half), minus)
    return None


def sylvester(order: int) -> Array:
    """The Sylvester-Hadamard matrix of `order`, a power of two."""
    result = np.ones((1, 1))
    while len(result) < order:
        result = np.block([[result, result], [result, -result]])
    return result


def hartley(order: int) -> Array:
    """cas(2 pi i j / order), a symmetric matrix whose square is `order` times the identity."""
    angle = 2 * np.pi * (np.outer(np.arange(order), np.arange(order)) % order) / order
    result: Array = np.cos(angle) + np.sin(angle)
    return result


@cache
def factors(n: int) -> tuple[Array, int]:
    """The factors of R: (B [m, m], unnormalised and read-only, 2^a) with n = m 2^a. Raises ValueError for n < 1."""
    if n < 1:
        raise ValueError(f"the order of a rotation must be at least 1, not {n}")
    odd = n
    while odd % 2 == 0:
        odd //= 2
    base, order = (np.ones((1, 1)), 1) if odd == 1 else (None, odd)
    while base is None and n % order == 0 and order <= MAX_PALEY_ORDER:
        base = paley(order)
        order *= 1 if base is not None else 2
    if base is None:
        base, order = hartley(odd), odd
    base.setflags(write=False)
    return base, n // order


@cache
def signs(n: int) -> Array:
    """Fixed pseudo-random signs [n], from splitmix64 (Steele et al. 2014) of n and the index; read-only."""
    with np.errstate(over="ignore"):
        z = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(n)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    result: Array = 1.0 - 2.0 * (z >> np.uint64(63)).astype(np.float64)
    result.setflags(write=False)
    return result


@cache
def rotation(n: int) -> Array:
    """R [n, n] as a dense read-only matrix: the definition, for tests and small n."""
    base, power = factors(n)
    result: Array = np.kron(base, sylvester(power)) * signs(n) / np.sqrt(n)
    result.setflags(write=False)
    return result
