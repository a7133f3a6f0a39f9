"""The Lagrangian relaxation of the budget: a lower bound, the price of a byte and a first solution, without a solver.

Sets        i in I: items; c in C[i]: their candidates; d in D: shared codebooks; l in L: limits
Data        cost[i,c] >= 0; bytes[i,c]; size[d]; users[d]: number of items with a candidate that needs d; capacity;
            use[l,i,c]; capacity[l]
Variables   p >= 0: price of a byte;  q[l] >= 0: price of a unit of limit l
Objective   max  L(p, q) = sum_i min_c (cost[i,c] + p weight[i,c] + sum_l q[l] use[l,i,c])
                           - p capacity - sum_l q[l] capacity[l]
            where weight[i,c] = bytes[i,c] + sum of size[d] / users[d] over the codebooks d that the candidate needs

L(p, q) is a lower bound of the cost of every feasible choice, for any prices. A codebook is charged in equal shares to
all items that might use it, which is never more than its size (this relaxes y[d] >= x[i,c] with equal multipliers). The
number of formats is not part of the relaxation, and neither is a limit at price 0.

L is concave. Its maximum over p is the bound, and the maximiser is the shadow price (Everett 1963; Fisher 1981). The
price is searched for in floats. The bound is then evaluated in fractions and rounded down, so it holds exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import inf, nextafter

import numpy as np
from numpy.typing import NDArray

from reallm.planner.problem.problem import Candidate, Item, Problem, needed_codebooks

PRICE_STEPS = 200
"""Maximum number of bisection steps in the search for a price."""
MAX_DOUBLINGS = 400
"""Maximum number of increases of a price until it is high enough."""
LIMIT_ROUNDS, NEAR_PRICE = 3, 1e-3
"""Maximum number of rounds over all limits in the search for their prices; and relative error of these prices."""
MIN_SCALE = 1e-200
"""Smallest scale assumed for the costs, so that prices stay above 0 even if all costs are 0."""
NEAR = 1e-12
"""Relative tolerance for equal values: far above the rounding of a sum of two products of non-negative numbers."""


@dataclass(frozen=True, slots=True)
class Relaxation:
    """A problem with all candidates of all items in one array [candidates], and a price for each limit."""

    problem: Problem
    shares: dict[str, Fraction]
    """Key of a shared codebook -> bytes that each item using it is charged."""
    own_cost: NDArray[np.float64]
    """[candidates]: cost without the prices of the limits."""
    cost: NDArray[np.float64]
    """[candidates]: cost plus sum over the limits of price times what the candidate uses of the limit."""
    weight: NDArray[np.float64]
    """[candidates]: bytes, including the shares of shared codebooks."""
    uses: NDArray[np.float64]
    """[candidates, limits]: how much of each limit a candidate uses."""
    starts: NDArray[np.intp]
    """[items]: index of the first candidate of each item."""
    prices: tuple[float, ...]
    """Price of each limit, per unit."""

    def priced(self, prices: Sequence[float]) -> Relaxation:
        """The same relaxation with other prices of the limits."""
        if not prices:
            return self
        return replace(self, cost=self.own_cost + self.uses @ np.array(prices), prices=tuple(prices))

    @property
    def limits_price(self) -> Fraction:
        """The sum of price * capacity over all limits, which the bound subtracts."""
        pairs = zip(self.prices, self.problem.limits, strict=True)
        return sum((Fraction(price) * limit.capacity for price, limit in pairs), Fraction(0))

    def picks(self, price: float) -> NDArray[np.intp]:
        """[items]: index of each item's cheapest candidate at `price`; of equals the first, which is the lightest."""
        value = self.cost + price * self.weight
        counts = np.diff([*self.starts.tolist(), value.size])
        cheapest = np.flatnonzero(value == np.repeat(np.minimum.reduceat(value, self.starts), counts))
        picks: NDArray[np.intp] = cheapest[np.searchsorted(cheapest, self.starts)]
        return picks

    def choose(self, price: float) -> list[Candidate]:
        """The cheapest candidate of each item at `price`."""
        picks = (self.picks(price) - self.starts).tolist()
        return [item.candidates[pick] for item, pick in zip(self.problem.items, picks, strict=True)]

    def total(self, price: float) -> float:
        """Bytes of the cheapest candidates at `price`, with the shares of codebooks."""
        return float(self.weight[self.picks(price)].sum())

    def exact_bound(self, price: float) -> float:
        """The bound L at `price` in exact arithmetic, rounded down to a float."""
        p = Fraction(price)
        bound, value = -p * self.problem.capacity - self.limits_price, self.cost + price * self.weight
        for item, a, b in zip(self.problem.items, self.starts, [*self.starts[1:], value.size], strict=True):
            near = np.flatnonzero(value[a:b] <= value[a:b].min() * (1 + NEAR))  # only these can be the exact minimum
            bound += min(self.cost_of(item.candidates[i]) + p * self.weight_of(item.candidates[i]) for i in near)
        rounded = float(bound)
        return nextafter(rounded, -inf) if Fraction(rounded) > bound else rounded

    def weight_of(self, candidate: Candidate) -> Fraction:
        """Exact bytes of one candidate, with its shares of codebooks."""
        return candidate.nbytes + sum((self.shares[key] for key in candidate.shared), Fraction(0))

    def cost_of(self, candidate: Candidate) -> Fraction:
        """Exact cost of one candidate, with the prices of the limits."""
        limit_prices = (Fraction(price) * use for price, use in zip(self.prices, candidate.uses, strict=True))
        return sum(limit_prices, Fraction(candidate.cost))


def relax(problem: Problem, prices: Sequence[float] = ()) -> Relaxation:
    """The relaxation of `problem` with a price for each limit; without `prices` the limits are left out.

    What shared codebooks use of a limit is not charged. This can only lower the bound, so it stays valid.
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
    """The price (cost per byte) at which the cheapest candidates just fit the capacity; 0 when they fit anyway.

    The search starts at `first` and ends at a relative error of `near`, where 0 means the precision of floats.
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
    """A price for each limit, close to the maximum of L.

    Coordinate search: each limit in turn gets the lowest price at which the cheapest candidates stay within it.
    """
    if not problem.limits:
        return ()
    free, prices = relax(problem), [0.0] * len(problem.limits)
    first = max(shadow_price(free) / 16, 1e-300)
    scale = max(float(np.maximum.reduceat(free.cost, free.starts).sum()), MIN_SCALE)
    for _ in range(LIMIT_ROUNDS):
        before = list(prices)
        for n, limit in enumerate(problem.limits):
            min_use = float(np.minimum.reduceat(free.uses[:, n], free.starts).sum())
            max_use = float(np.maximum.reduceat(free.uses[:, n], free.starts).sum())
            if not min_use <= limit.capacity < max_use:
                continue  # the limit is exceeded at any price, or at none

            def exceeds(price: float, n: int = n, capacity: int = limit.capacity) -> bool:
                tried = free.priced([*prices[:n], price, *prices[n + 1 :]])
                return float(tried.uses[tried.picks(shadow_price(tried, first, NEAR_PRICE)), n].sum()) > capacity

            prices[n] = _lowest_price(exceeds, 1e-3 * scale / max_use, scale)
        if prices == before:
            break
    return tuple(prices)


def _lowest_price(exceeds: Callable[[float], bool], first: float, max_price: float) -> float:
    """About the lowest price at which the limit is not exceeded; 0 if every price up to `max_price` exceeds it."""
    if not exceeds(0.0):
        return 0.0
    low, high = 0.0, first
    while exceeds(high):
        low, high = high, 4 * high
        if high > max_price:
            return 0.0
    while high - low > NEAR_PRICE * max(high, first):
        middle = (low + high) / 2
        low, high = (middle, high) if exceeds(middle) else (low, middle)
    return high


def incumbent(relaxation: Relaxation, price: float) -> list[Candidate] | None:
    """A good feasible choice, or None when none was found.

    Starts from the cheapest candidates at `price`, raises prices until they fit, and then improves the choice greedily.
    """
    problem, prices = relaxation.problem, relaxation.prices
    max_price = 1.0 + sum(max(c.cost for c in item.candidates) for item in problem.items)
    min_price = 1e-6 * max_price / max(problem.capacity, 1)
    for _ in range(MAX_DOUBLINGS):
        chosen = relaxation.choose(price)
        if problem.fits(chosen):
            return _spend_slack(problem, chosen)
        if problem.limits:
            exceeded = [problem.limit_use(chosen, n) > limit.capacity for n, limit in enumerate(problem.limits)]
            prices = tuple(max(p * 1.2, min_price) if e else p for p, e in zip(prices, exceeded, strict=True))
            relaxation = relaxation.priced(prices)
            price = max(price * 1.2, min_price) if problem.nbytes(chosen) > problem.capacity else price
            if max(prices) > max_price:
                return None
        else:
            price = max(2 * price, 1e-12)
    return None


def _spend_slack(problem: Problem, chosen: list[Candidate]) -> list[Candidate]:
    """Improve a choice greedily: make the change that saves most per byte and still fits, until none is left."""
    chosen, has_other_limits = list(chosen), problem.limits or problem.max_formats is not None
    while True:
        slack, used = problem.capacity - problem.nbytes(chosen), needed_codebooks(chosen)
        best: tuple[float, float, int, Candidate] | None = None
        for i, (item, current) in enumerate(zip(problem.items, chosen, strict=True)):
            for c in item.candidates:
                if c.cost >= current.cost:
                    continue
                extra = c.nbytes - current.nbytes + sum(problem.shared[key] for key in set(c.shared) - used)
                move = (-(current.cost - c.cost) / max(extra, 1), c.cost, i, c)
                if extra > slack or (best is not None and move >= best):
                    continue
                if not has_other_limits or problem.fits([*chosen[:i], c, *chosen[i + 1 :]]):
                    best = move
        if best is None:
            return chosen
        chosen[best[2]] = best[3]


def reduced_problem(relaxation: Relaxation, price: float, ceiling: float) -> Problem:
    """The problem without the candidates that cannot be part of a solution with a cost of at most `ceiling`.

    A solution with candidate c of item i costs at least L(price) + value[i,c] - min_c value[i,c], where value is
    cost + price * weight.
    """
    problem = relaxation.problem
    value = relaxation.cost + price * relaxation.weight
    lowest = np.minimum.reduceat(value, relaxation.starts)
    capacity_price = price * problem.capacity + float(relaxation.limits_price)
    bound = float(lowest.sum()) - capacity_price
    margin = 1e-9 * (abs(ceiling) + float(np.abs(lowest).sum()) + capacity_price)
    counts = np.diff([*relaxation.starts.tolist(), value.size])
    keep = bound + value - np.repeat(lowest, counts) <= ceiling + margin
    items, start = [], 0
    for item in problem.items:
        flags = keep[start : start + len(item.candidates)]
        items.append(Item(item.name, tuple(c for c, k in zip(item.candidates, flags, strict=True) if k)))
        start += len(item.candidates)
    return replace(problem, items=tuple(items))


def runners_up(
    problem: Problem, chosen: Sequence[Candidate], price: float, prices: Sequence[float] = ()
) -> list[str | None]:
    """[items]: format of the lowest-priced candidate other than the chosen one; None where there is no other.

    The price of a candidate is cost + price * bytes + the prices of the limits; codebooks in use are free.
    """
    used = needed_codebooks(chosen)

    def value(c: Candidate) -> tuple[float, Candidate]:
        new = sum(problem.shared[key] for key in set(c.shared) - used)
        return c.cost + price * (c.nbytes + new) + sum(p * u for p, u in zip(prices, c.uses, strict=False)), c

    rest = [[c for c in item.candidates if c != current] for item, current in zip(problem.items, chosen, strict=True)]
    return [min(others, key=value).format if others else None for others in rest]
