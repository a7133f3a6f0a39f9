"""Rotations are orthogonal with flat entries in every dimension, and identical on every machine."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reallm.kernels.codes.hadamard import MAX_PALEY_ORDER, factors, hartley, paley, rotation, signs, sylvester


@given(st.integers(1, 300))
def test_rotations_are_orthogonal_and_flat(n: int) -> None:
    R = rotation(n)
    # n products, each with an error of a few roundings of cosines and square roots
    np.testing.assert_allclose(R @ R.T, np.eye(n), rtol=0, atol=16 * n * np.finfo(float).eps)
    assert np.abs(R).max() <= np.sqrt(2 / n) * (1 + 1e-12)


@pytest.mark.parametrize("n", [12, 20, 24, 28, 36, 60, 192, 576, 1536, 896])
def test_dimensions_of_real_models_get_entries_of_one_size(n: int) -> None:
    base, power = factors(n)
    assert base.shape[0] * power == n and set(np.unique(base)) <= {-1.0, 1.0}


@pytest.mark.parametrize("order", range(1, 121))
def test_paley_gives_hadamard_matrices_or_nothing(order: int) -> None:
    matrix = paley(order)
    if matrix is not None:
        assert np.array_equal(np.abs(matrix), np.ones((order, order)))
        assert np.array_equal(matrix @ matrix.T, order * np.eye(order))
    assert matrix is None or order % 4 == 0


def test_a_prime_without_a_small_paley_order_takes_the_hartley_matrix() -> None:
    base, power = factors(43 * 4)
    assert power == 4 and np.array_equal(base, hartley(43)) and MAX_PALEY_ORDER < 43 * 128


@pytest.mark.parametrize("n", [0, -3])
def test_orders_below_one_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        factors(n)


def test_signs_are_fixed_and_balanced() -> None:
    values = signs(4096)
    assert abs(values.sum()) < 4 * 64  # four standard deviations of a sum of 4096 fair signs
    assert hashlib.sha256(np.packbits(values > 0).tobytes()).hexdigest()[:16] == SIGNS_4096
    assert not np.array_equal(signs(64), signs(65)[:64])


def test_sylvester_is_hadamard() -> None:
    S = sylvester(32)
    assert np.array_equal(S @ S.T, 32 * np.eye(32))


SIGNS_4096 = "95db4f51389eadf3"
