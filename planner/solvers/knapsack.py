"""The exact core: one choice per item within one capacity, a multiple-choice knapsack, solved and proved in numpy.

Sets        i in I: items; c in C[i]: their candidates
Data        cost[i,c] >= 0; bytes[i,c]; capacity
Problem     min  sum_i cost[i,c_i]   subject to   sum_i bytes[i,c_i] <= capacity

At a price p per byte let rc[i,c] = cost[i,c] + p bytes[i,c] - min over c of the same, the reduced cost, and L(p) the
Lagrangian bound (see `lagrangian`). Every choice then costs exactly

    L(p) + sum_i rc[i,c_i] + p (capacity - bytes of the choice),

three terms of which the last two are never negative. So a choice of cost at most L + delta holds only candidates with
rc <= delta, whose sum is at most delta, and leaves at most delta / p bytes unused. For a small delta few items have
more than one such candidate: the core (Balas and Zemel 1980; Pisinger 1995). A sparse dynamic programme over (bytes,
sum of rc) lists all such choices; when there is none, L + delta is a proven bound and delta grows. The first choice
found is the optimum, with no need of an incumbent or of a good one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import fsum, inf

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FIRST_OPTIONS = 12
"""The first delta admits so many candidates beside the cheapest of each item."""
GROWTH = 1.4
"""What delta is multiplied by when no choice was found: the number of states grows like exp(sqrt(delta))."""
MAX_STATES = 1_000_000
MAX_STEPS = 200
ROUNDING = 1e-12
"""Relative error allowed for in sums of costs: a choice that close to the bound is looked at, never lost."""


@dataclass(frozen=True, slots=True)
class Instance:
    """cost and bytes [items, most candidates]; where an item has fewer, cost is inf and bytes are 0."""

    cost: Floats
    nbytes: Ints

    def __post_init__(self) -> None:
        if self.cost.ndim != 2 or self.cost.shape != self.nbytes.shape or not self.cost.size:
            raise ValueError(f"costs {self.cost.shape} and bytes {self.nbytes.shape} are not one table")
        if np.isnan(self.cost).any() or (self.cost < 0).any() or (self.nbytes < 0).any():
            raise ValueError("a cost is negative or not a number, or bytes are negative")
        if not np.isfinite(self.cost).any(1).all():
            raise ValueError(f"item {int(np.argmin(np.isfinite(self.cost).any(1)))} has no candidate")

    @property
    def lightest(self) -> Ints:
        """The candidate of fewest bytes of each item, the cheapest of those."""
        return _least(np.where(np.isfinite(self.cost), self.nbytes, np.iinfo(np.int64).max), self.cost)

    def total(self, picks: Ints) -> tuple[float, int]:
        """(cost, bytes) of a choice, both exact."""
        rows = np.arange(len(picks))
        return fsum(self.cost[rows, picks].tolist()), int(self.nbytes[rows, picks].sum())


@dataclass(frozen=True, slots=True)
class Answer:
    """Choices by rising cost, the best first; a proven lower bound; the price of a byte; the work it took."""

    picks: tuple[Ints, ...]
    bound: float
    price: float
    optimal: bool
    """All of `picks` are proved to be the best ones; else the first is only feasible."""
    core: int = 0
    """Items of which more than one candidate was looked at in the end."""
    states: int = 0
    """The most states of the dynamic programme."""


@dataclass(slots=True)
class Relaxed:
    """Lagrangian optimum: the price, the choice that fits, its unused bytes, reduced costs."""

    price: float
    picks: Ints
    slack: int
    reduced: Floats
    bound: float


def solve_knapsack(instance: Instance, capacity: int, best: int = 1, max_states: int = MAX_STATES) -> Answer | None:
    """The `best` cheapest choices (fewer where there are not so many), or None when the lightest exceeds `capacity`.

    Equal costs are told apart by bytes; with `best` = 1 one of several optima is returned, always the same.
    """
    if instance.total(instance.lightest)[1] > capacity:
        return None
    relaxed = relax_knapsack(instance, capacity)
    incumbent = _filled(instance, relaxed)
    ceiling = instance.total(incumbent)[0]
    tolerance = ROUNDING * (ceiling + relaxed.price * capacity)
    delta = _first_delta(relaxed)
    if best == 1:
        delta = min(delta, ceiling - relaxed.bound)
    most = float(np.where(np.isfinite(relaxed.reduced), relaxed.reduced, 0).max(1).sum()) + relaxed.price * capacity
    proven = relaxed.bound
    while True:
        delta = max(delta, tolerance)
        search = _Search(instance, relaxed, delta + tolerance, best=best, max_states=max_states)
        found = search.run()
        if found is None:
            return Answer((incumbent,), proven, relaxed.price, False, search.core, search.states)
        ranked = sorted((*instance.total(picks), picks.tolist()) for picks in found)[:best]
        if len(ranked) >= best or delta >= most:
            picks = tuple(np.array(choice) for _, _, choice in ranked)
            return Answer(picks, ranked[0][0], relaxed.price, True, search.core, search.states)
        proven = relaxed.bound + delta
        delta = max(GROWTH * delta, float(relaxed.reduced[relaxed.reduced > delta].min(initial=most)))
        if best == 1 and proven < ceiling:
            delta = min(delta, ceiling - relaxed.bound)


def _first_delta(relaxed: Relaxed) -> float:
    """A delta that admits FIRST_OPTIONS candidates beside the cheapest of each item."""
    reduced = relaxed.reduced[np.isfinite(relaxed.reduced)]
    at = min(len(relaxed.reduced) - 1 + FIRST_OPTIONS, reduced.size - 1)
    return float(np.partition(reduced, at)[at])


def _least(first: Floats | Ints, second: Floats | Ints) -> Ints:
    """Per row, the index of the least `first`, the least `second` among equals."""
    smallest = first.min(1, keepdims=True)
    tied = np.where(first == smallest, second.astype(np.float64), inf)
    result: Ints = tied.argmin(1).astype(np.int64)
    return result


def relax_knapsack(instance: Instance, capacity: int) -> Relaxed:
    """The price at which the cheapest candidates just fit, by bisection over the items it still decides."""
    cost, nbytes, rows = instance.cost, instance.nbytes, np.arange(len(instance.cost))
    low, picks_low = 0.0, _least(cost, nbytes)
    if int(nbytes[rows, picks_low].sum()) <= capacity:
        return _at(instance, 0.0, picks_low, capacity)
    high, picks_high = 1.0 / max(int(nbytes.max()), 1), picks_low
    for _ in range(MAX_STEPS * 10):
        picks_high = _least(cost + high * nbytes, nbytes)
        if int(nbytes[rows, picks_high].sum()) <= capacity:
            break
        low, picks_low, high = high, picks_high, 4 * high
    for _ in range(MAX_STEPS):
        open_items = np.flatnonzero(picks_low != picks_high)
        middle = (low + high) / 2
        if not len(open_items) or middle in (low, high):
            break
        picks = picks_high.copy()
        picks[open_items] = _least(cost[open_items] + middle * nbytes[open_items], nbytes[open_items])
        if int(nbytes[rows, picks].sum()) <= capacity:
            high, picks_high = middle, picks
        else:
            low, picks_low = middle, picks
    return _at(instance, high, picks_high, capacity)


def _at(instance: Instance, price: float, picks: Ints, capacity: int) -> Relaxed:
    rows = np.arange(len(picks))
    value = instance.cost + price * instance.nbytes
    least = value.min(1)
    slack = capacity - int(instance.nbytes[rows, picks].sum())
    bound = fsum(instance.cost[rows, picks].tolist()) - price * slack
    return Relaxed(price, picks, slack, value - least[:, None], bound)


def _filled(instance: Instance, relaxed: Relaxed) -> Ints:
    """The relaxed choice with what is left spent: again and again the change that saves most and still fits."""
    picks, rows = relaxed.picks.copy(), np.arange(len(relaxed.picks))
    slack, now = relaxed.slack, instance.cost[rows, relaxed.picks]
    extra = instance.nbytes - instance.nbytes[rows, picks][:, None]
    items, candidates = np.nonzero((extra <= slack) & (instance.cost < now[:, None]))
    costs, weights = instance.cost[items, candidates], instance.nbytes[items, candidates]
    while len(items):
        gain = now[items] - costs
        needed = weights - instance.nbytes[items, picks[items]]
        usable = np.where(needed <= slack, gain, 0.0)
        at = int(usable.argmax())
        if usable[at] <= 0:
            break
        slack -= int(needed[at])
        picks[items[at]], now[items[at]] = candidates[at], costs[at]
    return picks


def _undominated(nbytes: Ints, cost: Floats, layers: int) -> Ints:
    """Indices of the states, by rising bytes, that fewer than `layers` others can beat in bytes and cost.

    Peeled off layer by layer: a state left over is beaten by one of every layer, so it is in no `layers` best choices.
    """
    order: Ints = np.argsort(nbytes, kind="stable")  # merges the runs
    left, kept = np.arange(len(order)), np.zeros(len(order), bool)
    for _ in range(layers):
        if not len(left):
            break
        costs = cost[order[left]]
        first = np.concatenate([[True], costs[1:] < np.minimum.accumulate(costs)[:-1]])
        kept[left[first]] = True
        left = left[~first]
    return order[kept]


@dataclass(slots=True)
class _Search:
    """Choices of cost at most L + delta, the `best` cheapest among them."""

    instance: Instance
    relaxed: Relaxed
    delta: float
    best: int
    max_states: int
    core: int = 0
    states: int = 1
    layers: list[tuple[int, Ints, Ints, Ints]] = field(default_factory=list)
    """Per item of the core: its row, its candidates, and of every state its parent and the place of its candidate."""

    def run(self) -> list[Ints] | None:
        """The choices, or None when there were too many states."""
        slack, price = self.relaxed.slack, self.relaxed.price
        groups = self._groups()
        self.core = len(groups)
        least = np.cumsum([0, *(int(extra.min()) for _, _, extra, _ in reversed(groups))])[::-1]
        most = np.cumsum([0, *(int(extra.max()) for _, _, extra, _ in reversed(groups))])[::-1]
        nbytes, reduced = np.zeros(1, np.int64), np.zeros(1)
        for at, (row, candidates, extra, rc) in enumerate(groups):
            total = rc[:, None] + reduced[None, :]  # a run of rising bytes for each candidate
            weight = extra[:, None] + nbytes[None, :]
            unused = np.maximum(slack - weight - most[at + 1], 0)  # at the very least, whatever comes after
            keep = (weight + least[at + 1] <= slack) & (total + price * unused <= self.delta)
            place, parent = np.nonzero(keep)
            nbytes, reduced = weight[keep], total[keep]
            chosen = _undominated(nbytes, reduced - price * nbytes, self.best)
            parent, place, nbytes, reduced = parent[chosen], place[chosen], nbytes[chosen], reduced[chosen]
            self.layers.append((row, candidates, parent, place))
            self.states = max(self.states, len(nbytes))
            if len(nbytes) > self.max_states:
                return None
        left = self.delta - reduced - price * (slack - nbytes)
        return [self._picks(int(state)) for state in np.flatnonzero((left >= 0) & (nbytes <= slack))]

    def _groups(self) -> list[tuple[int, Ints, Ints, Floats]]:
        """(row, candidates, bytes beyond the relaxed choice, reduced costs) of each item, the widest range first."""
        allowed = self.relaxed.reduced <= self.delta
        groups = []
        for row in np.flatnonzero(allowed.sum(1) > 1).tolist():
            candidates = np.flatnonzero(allowed[row])
            extra = self.instance.nbytes[row, candidates] - self.instance.nbytes[row, self.relaxed.picks[row]]
            groups.append((row, candidates, extra, self.relaxed.reduced[row, candidates]))
        return sorted(groups, key=lambda group: (int(group[2].min() - group[2].max()), group[0]))

    def _picks(self, state: int) -> Ints:
        picks = self.relaxed.picks.copy()
        for row, candidates, parent, place in reversed(self.layers):
            picks[row] = candidates[place[state]]
            state = int(parent[state])
        return picks
