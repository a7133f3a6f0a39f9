"""The exact core: a multiple-choice knapsack (one candidate per item, one capacity), solved and proved in numpy.

Sets        i in I: items; c in C[i]: their candidates
Data        cost[i,c] >= 0; bytes[i,c]; capacity
Variables   c_i in C[i]: the candidate that item i takes
Objective   min  sum_i cost[i,c_i]
Constraints budget:  sum_i bytes[i,c_i] <= capacity

For a price p per byte, let L(p) be the Lagrangian bound (see `lagrangian`) and rc[i,c] the reduced cost,

    rc[i,c] = cost[i,c] + p bytes[i,c] - min over c' of (cost[i,c'] + p bytes[i,c']).

Every choice then costs exactly

    L(p) + sum_i rc[i,c_i] + p (capacity - bytes of the choice),

where the last two terms are never negative. So a choice that costs at most L + delta has only candidates with
rc <= delta, their rc sum to at most delta, and it leaves at most delta / p bytes unused. For a small delta only few
items have more than one such candidate: these items are the core (Balas and Zemel 1980; Pisinger 1995). A sparse
dynamic program over (bytes, sum of rc) lists all such choices. If there is none, L + delta is a proven bound, and delta
grows. The first choice that is found this way is the optimum; no good solution has to be known beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import fsum, inf

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FIRST_OPTIONS = 12
"""Number of candidates within the first delta, in addition to the cheapest one of each item."""
GROWTH = 1.4
"""Factor by which delta grows when no choice was found; the number of states grows like exp(sqrt(delta))."""
MAX_STATES = 1_000_000
"""Number of states of the dynamic program beyond which the search gives up."""
MAX_STEPS = 200
"""Steps of the bisection for the price."""
ROUNDING = 1e-12
"""Relative rounding error allowed for in sums of costs, so that a choice this close to the bound is never missed."""


@dataclass(frozen=True, slots=True)
class Instance:
    """Costs and bytes, both [items, candidates]. Items with fewer candidates are padded with cost inf and 0 bytes."""

    cost: Floats
    nbytes: Ints

    def __post_init__(self) -> None:
        if self.cost.ndim != 2 or self.cost.shape != self.nbytes.shape or not self.cost.size:
            raise ValueError(
                f"costs {self.cost.shape} and bytes {self.nbytes.shape} differ in shape; expected [items, candidates]"
            )
        if np.isnan(self.cost).any() or (self.cost < 0).any() or (self.nbytes < 0).any():
            raise ValueError("a cost is negative or not a number, or bytes are negative")
        if not np.isfinite(self.cost).any(1).all():
            raise ValueError(f"item {int(np.argmin(np.isfinite(self.cost).any(1)))} has no candidate")

    @property
    def lightest(self) -> Ints:
        """[items]: index of each item's smallest candidate; among equals, of the cheapest."""
        return _argmin(np.where(np.isfinite(self.cost), self.nbytes, np.iinfo(np.int64).max), self.cost)

    def total(self, picks: Ints) -> tuple[float, int]:
        """Exact (cost, bytes) of a choice; `picks` [items] are candidate indices."""
        rows = np.arange(len(picks))
        return fsum(self.cost[rows, picks].tolist()), int(self.nbytes[rows, picks].sum())


@dataclass(frozen=True, slots=True)
class Answer:
    """The cheapest choices and what is proved about them."""

    picks: tuple[Ints, ...]
    """The choices, in order of rising cost."""
    bound: float
    """Proven lower bound of the cost of any choice."""
    price: float
    """Cost per byte at the Lagrangian optimum."""
    optimal: bool
    """Whether `picks` are proved to be the cheapest choices; if not, they are a single choice that is only feasible."""
    core: int = 0
    """Number of items in the last core."""
    states: int = 0
    """Largest number of states in the last dynamic program."""


@dataclass(slots=True)
class Relaxed:
    """The optimum of the Lagrangian relaxation."""

    price: float
    """Cost per byte."""
    picks: Ints
    """The choice that is cheapest at this price and fits."""
    slack: int
    """Bytes of the capacity that this choice leaves unused."""
    reduced: Floats
    """Reduced costs [items, candidates]."""
    bound: float


def solve_knapsack(instance: Instance, capacity: int, count: int = 1, max_states: int = MAX_STATES) -> Answer | None:
    """The `count` cheapest choices (fewer where fewer exist), or None when nothing fits `capacity`.

    Choices of equal cost are ordered by bytes. With `count` = 1, one of several optima is returned, always the same.
    """
    if instance.total(instance.lightest)[1] > capacity:
        return None
    relaxed = relax_knapsack(instance, capacity)
    incumbent = _spend_slack(instance, relaxed)
    ceiling = instance.total(incumbent)[0]
    tolerance = ROUNDING * (ceiling + relaxed.price * capacity)
    delta = _first_delta(relaxed)
    if count == 1:
        delta = min(delta, ceiling - relaxed.bound)
    finite = np.where(np.isfinite(relaxed.reduced), relaxed.reduced, 0)
    max_delta = float(finite.max(1).sum()) + relaxed.price * capacity
    proven = relaxed.bound
    while True:
        delta = max(delta, tolerance)
        search = _Search(instance, relaxed, delta + tolerance, count=count, max_states=max_states)
        choices = search.run()
        if choices is None:
            return Answer((incumbent,), proven, relaxed.price, False, search.core, search.states)
        ranked = sorted((*instance.total(picks), picks.tolist()) for picks in choices)[:count]
        if len(ranked) >= count or delta >= max_delta:
            picks = tuple(np.array(choice) for _, _, choice in ranked)
            return Answer(picks, ranked[0][0], relaxed.price, True, search.core, search.states)
        proven = relaxed.bound + delta
        delta = max(GROWTH * delta, float(relaxed.reduced[relaxed.reduced > delta].min(initial=max_delta)))
        if count == 1 and proven < ceiling:
            delta = min(delta, ceiling - relaxed.bound)


def _first_delta(relaxed: Relaxed) -> float:
    """The delta that admits FIRST_OPTIONS candidates besides the cheapest one of each item."""
    reduced = relaxed.reduced[np.isfinite(relaxed.reduced)]
    rank = min(len(relaxed.reduced) - 1 + FIRST_OPTIONS, reduced.size - 1)
    return float(np.partition(reduced, rank)[rank])


def _argmin(first: Floats | Ints, second: Floats | Ints) -> Ints:
    """For each row, the index of the smallest `first`; among equals, of the smallest `second`."""
    smallest = first.min(1, keepdims=True)
    tied = np.where(first == smallest, second.astype(np.float64), inf)
    result: Ints = tied.argmin(1).astype(np.int64)
    return result


def relax_knapsack(instance: Instance, capacity: int) -> Relaxed:
    """The Lagrangian optimum: the price at which the cheapest candidates just fit, found by bisection.

    Each step looks only at the items whose candidate differs between the two ends of the interval.
    """
    cost, nbytes, rows = instance.cost, instance.nbytes, np.arange(len(instance.cost))
    low, picks_low = 0.0, _argmin(cost, nbytes)
    if int(nbytes[rows, picks_low].sum()) <= capacity:
        return _relaxed_at(instance, 0.0, picks_low, capacity)
    high, picks_high = 1.0 / max(int(nbytes.max()), 1), picks_low
    for _ in range(MAX_STEPS * 10):
        picks_high = _argmin(cost + high * nbytes, nbytes)
        if int(nbytes[rows, picks_high].sum()) <= capacity:
            break
        low, picks_low, high = high, picks_high, 4 * high
    for _ in range(MAX_STEPS):
        open_items = np.flatnonzero(picks_low != picks_high)
        middle = (low + high) / 2
        if not len(open_items) or middle in (low, high):
            break
        picks = picks_high.copy()
        picks[open_items] = _argmin(cost[open_items] + middle * nbytes[open_items], nbytes[open_items])
        if int(nbytes[rows, picks].sum()) <= capacity:
            high, picks_high = middle, picks
        else:
            low, picks_low = middle, picks
    return _relaxed_at(instance, high, picks_high, capacity)


def _relaxed_at(instance: Instance, price: float, picks: Ints, capacity: int) -> Relaxed:
    rows = np.arange(len(picks))
    value = instance.cost + price * instance.nbytes
    lowest = value.min(1)
    slack = capacity - int(instance.nbytes[rows, picks].sum())
    bound = fsum(instance.cost[rows, picks].tolist()) - price * slack
    return Relaxed(price, picks, slack, value - lowest[:, None], bound)


def _spend_slack(instance: Instance, relaxed: Relaxed) -> Ints:
    """Improve the relaxed choice greedily: make the change that saves most and still fits, until none is left."""
    picks, rows = relaxed.picks.copy(), np.arange(len(relaxed.picks))
    slack, current = relaxed.slack, instance.cost[rows, relaxed.picks]
    extra = instance.nbytes - instance.nbytes[rows, picks][:, None]
    items, candidates = np.nonzero((extra <= slack) & (instance.cost < current[:, None]))
    costs, weights = instance.cost[items, candidates], instance.nbytes[items, candidates]
    while len(items):
        gain = current[items] - costs
        needed = weights - instance.nbytes[items, picks[items]]
        usable = np.where(needed <= slack, gain, 0.0)
        best = int(usable.argmax())
        if usable[best] <= 0:
            break
        slack -= int(needed[best])
        picks[items[best]], current[items[best]] = candidates[best], costs[best]
    return picks


def _undominated(nbytes: Ints, cost: Floats, layers: int) -> Ints:
    """Indices of the states, by rising bytes, that can be part of one of the `layers` cheapest choices.

    The Pareto front of (bytes, cost) is removed `layers` times. A state that remains is dominated by a state of each
    front, so it cannot be part of one of these choices.
    """
    order: Ints = np.argsort(nbytes, kind="stable")  # a stable sort merges the runs, which are sorted already
    remaining, on_front = np.arange(len(order)), np.zeros(len(order), bool)
    for _ in range(layers):
        if not len(remaining):
            break
        costs = cost[order[remaining]]
        front = np.concatenate([[True], costs[1:] < np.minimum.accumulate(costs)[:-1]])
        on_front[remaining[front]] = True
        remaining = remaining[~front]
    return order[on_front]


@dataclass(slots=True)
class _Search:
    """The dynamic program that lists the choices of cost at most L + delta, and keeps the `count` cheapest."""

    instance: Instance
    relaxed: Relaxed
    delta: float
    count: int
    max_states: int
    core: int = 0
    states: int = 1
    layers: list[tuple[int, Ints, Ints, Ints]] = field(default_factory=list)
    """For each core item: its row and candidates; and for each state: its parent and the index of its candidate."""

    def run(self) -> list[Ints] | None:
        """The cheapest choices; None when there were more than `max_states` states."""
        slack, price = self.relaxed.slack, self.relaxed.price
        groups = self._groups()
        self.core = len(groups)
        min_later = np.cumsum([0, *(int(extra.min()) for _, _, extra, _ in reversed(groups))])[::-1]
        max_later = np.cumsum([0, *(int(extra.max()) for _, _, extra, _ in reversed(groups))])[::-1]
        nbytes, reduced = np.zeros(1, np.int64), np.zeros(1)
        for n, (row, candidates, extra, rc) in enumerate(groups):
            total = rc[:, None] + reduced[None, :]  # [candidates, states]: states by rising bytes
            weight = extra[:, None] + nbytes[None, :]
            unused = np.maximum(slack - weight - max_later[n + 1], 0)  # lower bound, whatever later items take
            keep = (weight + min_later[n + 1] <= slack) & (total + price * unused <= self.delta)
            index, parent = np.nonzero(keep)
            nbytes, reduced = weight[keep], total[keep]
            kept = _undominated(nbytes, reduced - price * nbytes, self.count)
            parent, index, nbytes, reduced = parent[kept], index[kept], nbytes[kept], reduced[kept]
            self.layers.append((row, candidates, parent, index))
            self.states = max(self.states, len(nbytes))
            if len(nbytes) > self.max_states:
                return None
        left = self.delta - reduced - price * (slack - nbytes)
        return [self._picks(int(state)) for state in np.flatnonzero((left >= 0) & (nbytes <= slack))]

    def _groups(self) -> list[tuple[int, Ints, Ints, Floats]]:
        """For each core item: (row, candidates, bytes beyond the relaxed choice, reduced costs); widest byte range
        first."""
        allowed = self.relaxed.reduced <= self.delta
        groups = []
        for row in np.flatnonzero(allowed.sum(1) > 1).tolist():
            candidates = np.flatnonzero(allowed[row])
            extra = self.instance.nbytes[row, candidates] - self.instance.nbytes[row, self.relaxed.picks[row]]
            groups.append((row, candidates, extra, self.relaxed.reduced[row, candidates]))
        return sorted(groups, key=lambda group: (int(group[2].min() - group[2].max()), group[0]))

    def _picks(self, state: int) -> Ints:
        """The choice whose path through the dynamic program ends in `state`."""
        picks = self.relaxed.picks.copy()
        for row, candidates, parent, index in reversed(self.layers):
            picks[row] = candidates[index[state]]
            state = int(parent[state])
        return picks
