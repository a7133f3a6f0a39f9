"""The Triton search finds the codes of the native search, and walks as cheap as those of a plain search in float64."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import interpreted
import numpy as np
import pytest
import torch
from interpreted_search import SearchCase, search_interpreted
from numpy.typing import NDArray

from reallm.codecs.trellis.device_search import device_walks, quantised_code, warps, words_per_group
from reallm.codecs.trellis.encode import SCALES
from reallm.codecs.trellis.viterbi import closed_walks
from reallm.codegen.cpu.compiler import library
from reallm.kernels.codes.trellis import CODE_STD, code_table, step_shape

pytest.importorskip("triton", reason="Triton is an extra")

NATIVE = library("trellis") is not None
CASES = [
    *(SearchCase(8, 2), SearchCase(10, 4), SearchCase(12, 6), SearchCase(8, 12)),
    *(SearchCase(11, 3), SearchCase(9, 7)),
    *(SearchCase(8, 5, tiles=2, feedback=True), SearchCase(8, 8, tiles=2, feedback=True)),
]
"""Each number of bits per step from 1 to 7, one and two values per step, with and without feedback."""


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    """A process whose Triton interprets kernels."""
    spawn, cache = multiprocessing.get_context("spawn"), tmp_path_factory.mktemp("cache")
    with ProcessPoolExecutor(1, spawn, initializer=interpreted.start, initargs=(cache,)) as pool:
        yield pool


def quantised_distances(case: SearchCase, tile: NDArray[np.float32]) -> NDArray[np.float64]:
    """The distance of each state at each step of a tile in the search's units, float64 [steps, 2^L]."""
    per_step, _, steps = step_shape(case.width)
    codes = code_table(case.state_bits, per_step).astype(np.float64)
    unit = np.float32(255) / np.float32(case.clip)
    limit = np.float32(np.abs(codes).max()) / np.float32(CODE_STD)
    goals = np.rint(np.clip(tile.reshape(steps, per_step), -limit, limit) * unit).astype(np.float64)
    quantised = np.rint(codes.astype(np.float32) / np.float32(CODE_STD) * unit).astype(np.float64)
    gaps = np.minimum(np.abs(goals[:, None, :] - quantised), 255)
    total: NDArray[np.float64] = np.floor(gaps * gaps / 8).sum(2)
    return total


def cheapest_walk(case: SearchCase, distances: NDArray[np.float64], shared: int | None) -> tuple[float, list[int]]:
    """The lowest cost and its walk, by a plain Viterbi search in float64 that saturates nothing."""
    _, bits, _ = step_shape(case.width)
    states = np.arange(1 << case.state_bits)
    groups = len(states) >> bits
    metric = distances[0] + (0.0 if shared is None else np.where(states >> bits == shared, 0.0, np.inf))
    origins = []
    for row in distances[1:]:
        arriving = metric.reshape(1 << bits, groups)
        origins.append(arriving.argmin(0) * groups + np.arange(groups))
        metric = arriving.min(0)[states >> bits] + row
    if shared is not None:
        metric = np.where(states % groups == shared, metric, np.inf)
    walk = [int(metric.argmin())]
    for origin in reversed(origins):
        walk.append(int(origin[walk[-1] >> bits]))
    return float(metric.min()), walk[::-1]


def reference_cost(case: SearchCase, tile: NDArray[np.float32]) -> float:
    """The cost of the closed walk that the two passes find in float64."""
    _, bits, steps = step_shape(case.width)
    distances, half = quantised_distances(case, tile), min(128, steps) // 2
    _, around = cheapest_walk(case, np.concatenate([distances[steps - half :], distances[:half]]), None)
    return cheapest_walk(case, distances, around[half] >> bits)[0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_finds_the_cheapest_walks(case: SearchCase, interpreter: ProcessPoolExecutor) -> None:
    values, states = interpreter.submit(search_interpreted, case).result()
    per_step, bits, steps = step_shape(case.width)
    target, below = case.inputs()
    groups = 1 << (case.state_bits - bits)
    assert (states % groups == np.roll(states, -1, axis=1) >> bits).all()  # every walk follows the trellis, and closes
    codes = code_table(case.state_bits, per_step)[states].reshape(-1, 256)
    assert np.array_equal(values.reshape(-1, 256), codes.astype(np.float32) / np.float32(CODE_STD))
    if NATIVE:
        expected, walks = closed_walks(target, case.state_bits, case.width, case.clip, below)
        assert np.array_equal(states, walks)
        assert np.array_equal(values, expected.numpy())
    if below is None:
        tile = target.numpy().reshape(-1)
        distances = quantised_distances(case, tile)
        found = float(distances[np.arange(steps), states[0]].sum())
        assert found == pytest.approx(reference_cost(case, tile), rel=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("state_bits", [8, 10, 12, 14, 16])
def test_the_gpu_finds_the_native_codes(state_bits: int, feedback: bool) -> None:
    for width in sorted({*SCALES, 1, 3, 7}):
        case = SearchCase(state_bits, width, tiles=4 if feedback else 40, feedback=feedback)
        target, below = case.inputs()
        expected, walks = closed_walks(target, state_bits, width, case.clip, below)
        on_device = None if below is None else below.cuda()
        values, states = device_walks(target.cuda(), state_bits, width, case.clip, on_device)
        assert np.array_equal(states, walks), width
        assert torch.equal(values.cpu(), expected), width


def test_sizes_of_the_kernel() -> None:
    assert [warps(bits) for bits in (8, 10, 12, 14, 16)] == [1, 2, 8, 32, 32]
    assert [words_per_group(width) for width in (1, 2, 3, 4, 6, 12)] == [4, 8, 13, 16, 26, 52]
    assert int(np.abs(quantised_code(12, 1, 0.6)).max()) < 1 << 15  # as in the native search, which keeps 16 bits
