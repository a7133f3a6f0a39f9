"""Allocation problems shaped like large models, with costs interpolated from measured ones; used by planner.py.

benchmarks/results/costs.json holds the bytes and the cost of every format of every matrix of SmolLM2-135M, which
NAME=quality measured. A matrix of role r in block b of a larger model gets the curve of the block at the same relative
depth, read at CANDIDATES rates (log cost is nearly linear in bits) and scaled by the number of weights. Real formats do
not lie on one curve: each cost is multiplied by exp(s z), z standard normal and s the measured spread about a fit.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from benchmarks.peers import ROOT
from reallm.planner.solvers.knapsack import Instance

COSTS = ROOT / "benchmarks" / "results" / "costs.json"
CANDIDATES, MIN_BITS, MAX_BITS, UNIT = 100, 1.5, 8.0, 32
"""Bytes are multiples of UNIT."""

Shape = tuple[str, int, int]
"""(role, rows, cols)"""


def llama(blocks: int, hidden: int, kv: int, inner: int) -> list[list[Shape]]:
    """The blocks of a LLaMA with `kv` rows of keys and of values and `inner` rows in the MLP."""
    attention = [("q", hidden, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, hidden)]
    mlp = [("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)]
    return [attention + mlp for _ in range(blocks)]


def _mlp(hidden: int, inner: int) -> list[Shape]:
    return [("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)]


def _deepseek() -> list[list[Shape]]:
    mla = [("q", 1536, 7168), ("q", 24576, 1536), ("k", 576, 7168), ("v", 32768, 512), ("o", 7168, 16384)]
    dense, sparse = mla + _mlp(7168, 18432), mla + 257 * _mlp(7168, 2048)
    return 3 * [dense] + 58 * [sparse]


MODELS = {
    "LLaMA-2-7B": llama(32, 4096, 4096, 11008),
    "LLaMA-3-405B": llama(126, 16384, 1024, 53248),
    "DeepSeek-V3": _deepseek(),
}


@dataclass(frozen=True)
class Curve:
    """Log of the cost per weight as a function of bits per weight, for one matrix of the measured model."""

    bits: tuple[float, ...]
    log_cost: tuple[float, ...]

    def at(self, bits: np.ndarray) -> np.ndarray:
        """Log cost at `bits`: linear between the measured points, beyond them with a slope of 2 log 2 per bit."""
        inner = np.interp(bits, self.bits, self.log_cost)
        return inner - 2 * np.log(2) * np.maximum(bits - self.bits[-1], 0)


def measured_curves() -> dict[tuple[str, int], Curve]:
    """(role, block) -> its curve."""
    curves = {}
    for name, record in json.loads(COSTS.read_text(encoding="utf-8")).items():
        points = sorted((8 * nbytes / record["numel"], cost / record["numel"]) for nbytes, cost in record["formats"])
        role, block = name.split(".")
        falling = points[:1]
        for point in points[1:]:
            if point[1] < falling[-1][1]:
                falling.append(point)
        curves[role, int(block)] = Curve(tuple(b for b, _ in falling), tuple(float(np.log(c)) for _, c in falling))
    return curves


def scatter(curves: dict[tuple[str, int], Curve]) -> float:
    """Median over the matrices of the standard deviation of log cost about a straight line."""
    spread = []
    for curve in curves.values():
        fit = np.polyfit(curve.bits, curve.log_cost, 1)
        spread.append(float(np.std(np.array(curve.log_cost) - np.polyval(fit, curve.bits))))
    return float(np.median(spread))


def instance(model: str, seed: int = 0) -> tuple[Instance, int]:
    """The instance shaped like `model`, and its total number of weights."""
    curves, rng = measured_curves(), np.random.default_rng(seed)
    noise, depth = scatter(curves), 1 + max(block for _, block in curves)
    costs, sizes, numel = [], [], 0
    for block, shapes in enumerate(MODELS[model]):
        like = round(block * (depth - 1) / (len(MODELS[model]) - 1))
        for role, rows, cols in shapes:
            bits = np.sort(rng.uniform(MIN_BITS, MAX_BITS, CANDIDATES))
            cost = rows * cols * np.exp(curves[role, like].at(bits) + noise * rng.standard_normal(CANDIDATES))
            costs.append(cost)
            sizes.append(np.ceil(bits * rows * cols / 8 / UNIT).astype(np.int64) * UNIT)
            numel += rows * cols
    return Instance(np.array(costs), np.array(sizes)), numel
