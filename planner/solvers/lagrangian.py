"""The Lagrangian relaxation of the budget: a lower bound, the price of a byte and a first solution, without a solver.

For a price p >= 0 and a = capacity, every feasible choice costs at least

    L(p) = sum_i min_c (cost[i,c] + p * weight[i,c]) - p * a

where weight[i,c] = bytes[i,c] + sum over the codebooks d it needs of size[d] / users[d], users[d] the number of items
with a candidate that needs d: a codebook costs its full size, so no less than a share from each of its users (this
relaxes y[d] >= x[i,c] with equal multipliers). A further limit with use u and capacity b has a price q of its own,
which adds q u to every candidate and -q b to the bound; at price 0 it is left out, as the number of formats always is.
L is concave; its maximum over p is the bound, the maximiser the shadow price (Everett 1963; Fisher 1981). The price is
searched in floats; the bound is then evaluated in fractions and rounded down, so it holds exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import inf, nextafter

import numpy as np
from numpy.typing import NDArray

from reallm.planner.problem.problem import Candidate, Item, Problem, needed

PRICE_STEPS = 200
MAX_DOUBLINGS = 400
LIMIT_ROUNDS, NEAR_PRICE = 3, 1e-3
LEAST_SCALE = 1e-200
"""Of all costs together, so that prices stay clear of zero where nothing costs anything."""
NEAR = 1e-12
"""Relative; well over the rounding of a sum of two products, as costs and bytes are never negative."""


@dataclass(frozen=True, slots=True)
class Relaxation:
    """All candidates in one row: arrays [candidates], the limits' prices in `cost`; item i starts at starts[i]."""

    problem: Problem
    shares: dict[str, Fraction]
    own: NDArray[np.float64]
    """Cost without the limits' prices."""
    cost: NDArray[np.float64]
    weight: NDArray[np.float64]
    uses: NDArray[np.float64]
    """[candidates, limits]."""
    starts: NDArray[np.intp]
    prices: tuple[float, ...]
    """Of each limit."""

    def priced(self, prices: Sequence[float]) -> Relaxation:
        """The same with other prices of the limits."""
        return replace(self, cost=self.own + self.uses @ np.array(prices), prices=tuple(prices)) if prices else self

    @property
    def limits_price(self) -> Fraction:
        """What the limits' prices take off the bound."""
        pairs = zip(self.prices, self.problem.limits, strict=True)
        return sum((Fraction(price) * limit.capacity for price, limit in pairs), Fraction(0))

    def picks(self, price: float) -> NDArray[np.intp]:
        """Index of the first cheapest candidate of each item at `price`, in canonical order (the lightest)."""
        value = self.cost + price * self.weight
        counts = np.diff([*self.starts.tolist(), value.size])
        cheapest = np.flatnonzero(value == np.repeat(np.minimum.reduceat(value, self.starts), counts))
        found: NDArray[np.intp] = cheapest[np.searchsorted(cheapest, self.starts)]
        return found

    def choose(self, price: float) -> list[Candidate]:
        """The first cheapest candidate of each item at `price`."""
        own = (self.picks(price) - self.starts).tolist()
        return [item.candidates[pick] for item, pick in zip(self.problem.items, own, strict=True)]

    def total(self, price: float) -> float:
        """Relaxed bytes of the cheapest candidates at `price`."""
        return float(self.weight[self.picks(price)].sum())

    def exact_bound(self, price: float) -> float:
        """L(price) in exact arithmetic, rounded down to a float."""
        p = Fraction(price)
        bound, value = -p * self.problem.capacity - self.limits_price, self.cost + price * self.weight
        for item, a, b in zip(self.problem.items, self.starts, [*self.starts[1:], value.size], strict=True):
            near = np.flatnonzero(value[a:b] <= value[a:b].min() * (1 + NEAR))  # no other can be the exact minimum
            bound += min(self.cost_of(item.candidates[i]) + p * self.weight_of(item.candidates[i]) for i in near)
        rounded = float(bound)
        return nextafter(rounded, -inf) if Fraction(rounded) > bound else rounded

    def weight_of(self, candidate: Candidate) -> Fraction:
        """Exact relaxed bytes of one candidate."""
        return candidate.nbytes + sum((self.shares[key] for key in candidate.shared), Fraction(0))

    def cost_of(self, candidate: Candidate) -> Fraction:
        """Exact cost of one candidate, the limits' prices in it."""
        paid = (Fraction(price) * use for price, use in zip(self.prices, candidate.uses, strict=True))
        return sum(paid, Fraction(candidate.cost))


def relax(problem: Problem, prices: Sequence[float] = ()) -> Relaxation:
    """The relaxation of `problem`, with a price for each of its limits; none leaves the limits out.

    What a shared codebook uses of a limit is left out of that limit, which keeps the bound one.
    """
    users = {
        key: sum(any(key in c.shared for c in item.candidates) for item in problem.items) for key in problem.shared
    }
    shares = {key: Fraction(size, users[key]) for key, size in problem.shared.items()}
    flat = [c for item in problem.items for c in item.candidates]
    weight = [c.nbytes + float(sum((shares[key] for key in c.shared), Fraction(0))) for c in flat]
    counts = np.array([len(item.candidates) for item in problem.items], dtype=np.intp)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.intp)
    cost, uses = np.array([c.cost for c in flat]), np.array([c.uses for c in flat], np.float64)
    free = (0.0,) * len(problem.limits)
    return Relaxation(problem, shares, cost, cost, np.array(weight), uses, starts, free).priced(tuple(prices))


def shadow_price(relaxation: Relaxation, first: float = 1e-12, near: float = 0.0) -> float:
    """The price (cost per byte) at which the cheapest candidates just fit the capacity; 0 when they fit for nothing.

    Searched from `first` up, to a relative error `near`, 0 for as near as floats come.
    """
    capacity = relaxation.problem.capacity
    if relaxation.total(0.0) <= capacity:
        return 0.0
    low, high = 0.0, first
    for _ in range(MAX_DOUBLINGS):
        if relaxation.total(high) <= capacity:
            break
        low, high = high, 2 * high
    else:
        return low
    for _ in range(PRICE_STEPS):
        middle = (low + high) / 2
        if middle in (low, high) or high - low <= near * high:
            break
        low, high = (low, middle) if relaxation.total(middle) <= capacity else (middle, high)
    return high


def limit_prices(problem: Problem) -> tuple[float, ...]:
    """A price for each limit, near the maximum of L: one after the other, the least at which its own limit is kept."""
    if not problem.limits:
        return ()
    free, prices = relax(problem), [0.0] * len(problem.limits)
    first = max(shadow_price(free) / 16, 1e-300)
    scale = max(float(np.maximum.reduceat(free.cost, free.starts).sum()), LEAST_SCALE)
    for _ in range(LIMIT_ROUNDS):
        before = list(prices)
        for n, limit in enumerate(problem.limits):
            least = float(np.minimum.reduceat(free.uses[:, n], free.starts).sum())
            most = float(np.maximum.reduceat(free.uses[:, n], free.starts).sum())
            if not least <= limit.capacity < most:
                continue  # no price keeps it, or any does

            def over(price: float, n: int = n, capacity: int = limit.capacity) -> bool:
                tried = free.priced([*prices[:n], price, *prices[n + 1 :]])
                return float(tried.uses[tried.picks(shadow_price(tried, first, NEAR_PRICE)), n].sum()) > capacity

            prices[n] = _least_price(over, 1e-3 * scale / most, scale)
        if prices == before:
            break
    return tuple(prices)


def _least_price(over: Callable[[float], bool], first: float, most: float) -> float:
    """The least price, nearly, at which nothing is `over` any more; 0 if there is none up to `most`."""
    if not over(0.0):
        return 0.0
    low, high = 0.0, first
    while over(high):
        low, high = high, 4 * high
        if high > most:
            return 0.0
    while high - low > NEAR_PRICE * max(high, first):
        middle = (low + high) / 2
        low, high = (middle, high) if over(middle) else (low, middle)
    return high


def incumbent(relaxation: Relaxation, price: float) -> list[Candidate] | None:
    """A good feasible choice: the relaxed one, at higher prices if it is too large, then filled up."""
    problem, prices = relaxation.problem, relaxation.prices
    most = 1.0 + sum(max(c.cost for c in item.candidates) for item in problem.items)
    least = 1e-6 * most / max(problem.capacity, 1)
    for _ in range(MAX_DOUBLINGS):
        chosen = relaxation.choose(price)
        if problem.fits(chosen):
            return _filled(problem, chosen)
        if problem.limits:
            broken = [problem.used(chosen, n) > limit.capacity for n, limit in enumerate(problem.limits)]
            prices = tuple(max(p * 1.2, least) if b else p for p, b in zip(prices, broken, strict=True))
            relaxation = relaxation.priced(prices)
            price = max(price * 1.2, least) if problem.nbytes(chosen) > problem.capacity else price
            if max(prices) > most:
                return None
        else:
            price = max(2 * price, 1e-12)
    return None


def _filled(problem: Problem, chosen: list[Candidate]) -> list[Candidate]:
    """Spend what is left: again and again the change that saves most per byte and still fits."""
    chosen, watched = list(chosen), problem.limits or problem.max_formats is not None
    while True:
        slack, used = problem.capacity - problem.nbytes(chosen), needed(chosen)
        best: tuple[float, float, int, Candidate] | None = None
        for i, (item, now) in enumerate(zip(problem.items, chosen, strict=True)):
            for c in item.candidates:
                if c.cost >= now.cost:
                    continue
                extra = c.nbytes - now.nbytes + sum(problem.shared[key] for key in set(c.shared) - used)
                move = (-(now.cost - c.cost) / max(extra, 1), c.cost, i, c)
                if extra > slack or (best is not None and move >= best):
                    continue
                if not watched or problem.fits([*chosen[:i], c, *chosen[i + 1 :]]):
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
    least, limits_price = (
        np.minimum.reduceat(value, relaxation.starts),
        price * problem.capacity + float(relaxation.limits_price),
    )
    bound = float(least.sum()) - limits_price
    margin = 1e-9 * (abs(ceiling) + float(np.abs(least).sum()) + limits_price)
    counts = np.diff([*relaxation.starts.tolist(), value.size])
    keep = bound + value - np.repeat(least, counts) <= ceiling + margin
    items, at = [], 0
    for item in problem.items:
        flags = keep[at : at + len(item.candidates)]
        items.append(Item(item.name, tuple(c for c, k in zip(item.candidates, flags, strict=True) if k)))
        at += len(item.candidates)
    return replace(problem, items=tuple(items))


def runners_up(
    problem: Problem, chosen: Sequence[Candidate], price: float, prices: Sequence[float] = ()
) -> list[str | None]:
    """Per item, the format next best in cost + price * bytes + the limits' prices, codebooks in use free of charge."""
    used = needed(chosen)

    def value(c: Candidate) -> tuple[float, Candidate]:
        new = sum(problem.shared[key] for key in set(c.shared) - used)
        return c.cost + price * (c.nbytes + new) + sum(p * u for p, u in zip(prices, c.uses, strict=False)), c

    rest = [[c for c in item.candidates if c != now] for item, now in zip(problem.items, chosen, strict=True)]
    return [min(others, key=value).format if others else None for others in rest]
