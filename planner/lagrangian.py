"""The Lagrangian relaxation of the budget: a lower bound, the price of a byte and a first solution, without a solver.

For a price p >= 0 and a = capacity, every feasible choice costs at least

    L(p) = sum_i min_c (cost[i,c] + p * weight[i,c]) - p * a

where weight[i,c] = bytes[i,c] + sum over the codebooks d it needs of size[d] / users[d], users[d] the number of items
with a candidate that needs d: a codebook costs its full size, so no less than a share from each of its users (this
relaxes y[d] >= x[i,c] with equal multipliers). L is concave; its maximum over p is the bound, the maximiser the shadow
price (Everett 1963; Fisher 1981). The price is searched in floats; the bound is then evaluated in fractions and rounded
down, so it holds exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import inf, nextafter

import numpy as np
from numpy.typing import NDArray

from .problem import Candidate, Item, Problem, needed

PRICE_STEPS = 200
MAX_DOUBLINGS = 400
NEAR = 1e-12
"""Relative; well over the rounding of a sum of two products, as costs and bytes are never negative."""


@dataclass(frozen=True, slots=True)
class Relaxation:
    """All candidates in one row: cost, weight and value arrays [candidates]; item i starts at starts[i]."""

    problem: Problem
    shares: dict[str, Fraction]
    cost: NDArray[np.float64]
    weight: NDArray[np.float64]
    starts: NDArray[np.intp]

    def choose(self, price: float) -> list[Candidate]:
        """The first cheapest candidate of each item at `price`, in canonical order (the lightest)."""
        value = self.cost + price * self.weight
        bounds = [*self.starts.tolist(), value.size]
        picks = [int(np.argmin(value[a:b])) for a, b in pairwise(bounds)]
        return [item.candidates[pick] for item, pick in zip(self.problem.items, picks, strict=True)]

    def total(self, price: float) -> float:
        """Relaxed bytes of the cheapest candidates at `price`."""
        return float(
            sum(c.nbytes + sum(map(float, map(self.shares.__getitem__, c.shared))) for c in self.choose(price))
        )

    def exact_bound(self, price: float) -> float:
        """L(price) in exact arithmetic, rounded down to a float."""
        p = Fraction(price)
        bound, value = -p * self.problem.capacity, self.cost + price * self.weight
        for item, a, b in zip(self.problem.items, self.starts, [*self.starts[1:], value.size], strict=True):
            near = np.flatnonzero(value[a:b] <= value[a:b].min() * (1 + NEAR))  # no other can be the exact minimum
            bound += min(Fraction(item.candidates[i].cost) + p * self.weight_of(item.candidates[i]) for i in near)
        rounded = float(bound)
        return nextafter(rounded, -inf) if Fraction(rounded) > bound else rounded

    def weight_of(self, candidate: Candidate) -> Fraction:
        """Exact relaxed bytes of one candidate."""
        return candidate.nbytes + sum((self.shares[key] for key in candidate.shared), Fraction(0))


def relax(problem: Problem) -> Relaxation:
    """The relaxation of `problem`."""
    users = {
        key: sum(any(key in c.shared for c in item.candidates) for item in problem.items) for key in problem.shared
    }
    shares = {key: Fraction(size, users[key]) for key, size in problem.shared.items()}
    flat = [c for item in problem.items for c in item.candidates]
    weight = [c.nbytes + float(sum((shares[key] for key in c.shared), Fraction(0))) for c in flat]
    counts = np.array([len(item.candidates) for item in problem.items], dtype=np.intp)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.intp)
    return Relaxation(problem, shares, np.array([c.cost for c in flat]), np.array(weight), starts)


def shadow_price(relaxation: Relaxation) -> float:
    """The price (cost per byte) at which the cheapest candidates just fit the capacity; 0 when they fit for nothing."""
    capacity = relaxation.problem.capacity
    if relaxation.total(0.0) <= capacity:
        return 0.0
    low, high = 0.0, 1e-12
    for _ in range(MAX_DOUBLINGS):
        if relaxation.total(high) <= capacity:
            break
        low, high = high, 2 * high
    else:
        return low
    for _ in range(PRICE_STEPS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (low, middle) if relaxation.total(middle) <= capacity else (middle, high)
    return high


def incumbent(relaxation: Relaxation, price: float) -> list[Candidate] | None:
    """A good feasible choice: the relaxed one, at a higher price if codebooks make it too large, then filled up."""
    problem = relaxation.problem
    for _ in range(MAX_DOUBLINGS):
        chosen = relaxation.choose(price)
        if problem.nbytes(chosen) <= problem.capacity:
            return _filled(problem, chosen)
        price = max(2 * price, 1e-12)
    return None


def _filled(problem: Problem, chosen: list[Candidate]) -> list[Candidate]:
    """Spend what is left: again and again the change that saves most per byte and still fits."""
    chosen = list(chosen)
    while True:
        slack, used = problem.capacity - problem.nbytes(chosen), needed(chosen)
        best: tuple[float, float, int, Candidate] | None = None
        for i, (item, now) in enumerate(zip(problem.items, chosen, strict=True)):
            for c in item.candidates:
                if c.cost >= now.cost:
                    continue
                extra = c.nbytes - now.nbytes + sum(problem.shared[key] for key in set(c.shared) - used)
                move = (-(now.cost - c.cost) / max(extra, 1), c.cost, i, c)
                if extra <= slack and (best is None or move < best):
                    best = move
        if best is None:
            return chosen
        chosen[best[2]] = best[3]


def reduced(relaxation: Relaxation, price: float, ceiling: float) -> Problem:
    """The problem without candidates that no solution of cost `ceiling` or less can hold.

    A solution with candidate c of item i costs at least L(price) + value[i,c] - min_c value[i,c].
    """
    problem = relaxation.problem
    value = relaxation.cost + price * relaxation.weight
    least = np.minimum.reduceat(value, relaxation.starts)
    bound = float(least.sum()) - price * problem.capacity
    margin = 1e-9 * (abs(ceiling) + float(np.abs(least).sum()) + price * problem.capacity)
    counts = np.diff([*relaxation.starts.tolist(), value.size])
    keep = bound + value - np.repeat(least, counts) <= ceiling + margin
    items, at = [], 0
    for item in problem.items:
        flags = keep[at : at + len(item.candidates)]
        items.append(Item(item.name, tuple(c for c, k in zip(item.candidates, flags, strict=True) if k)))
        at += len(item.candidates)
    return Problem(tuple(items), problem.shared, problem.capacity)


def runners_up(problem: Problem, chosen: Sequence[Candidate], price: float) -> list[str | None]:
    """Per item, the format next best in cost + price * bytes, codebooks that are in use free of charge."""
    used = needed(chosen)

    def value(c: Candidate) -> tuple[float, Candidate]:
        return c.cost + price * (c.nbytes + sum(problem.shared[key] for key in set(c.shared) - used)), c

    rest = [[c for c in item.candidates if c != now] for item, now in zip(problem.items, chosen, strict=True)]
    return [min(others, key=value).format if others else None for others in rest]
