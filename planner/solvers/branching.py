"""The exact search where codebooks are shared or formats few: they are decided one by one, down to plain knapsacks.

Data        cost[i,f], bytes[i,f]: item i in format f;  D[i,f]: the codebooks it needs;  size[d];  capacity;  most
Problem     min  sum_i cost[i,f_i]   subject to   sum_i bytes[i,f_i] + sum of size[d] over the d needed <= capacity
            and at most `most` different formats

A node has decided of some codebooks that they are stored (and paid) or not, and of some formats that they may be used
or not. At any price p of a byte a node's choices cost at least

    sum_i min_f value[i,f]  -  p (capacity - stored codebooks)

where value = cost + p (bytes + shares); where formats must still go, the bound of `medians` takes the place of the sum.
A codebook that is not decided is paid in shares of whole bytes that sum to its size at most, each item's in proportion
to what the codebook saves it; so it is either used by all whom it serves or by none, and where it serves no item beside
another the bound is that of the right decision. Where nothing is left to decide the node is a multiple-choice knapsack,
solved by `knapsack`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from math import fsum, inf, isinf

import numpy as np
from numpy.typing import NDArray

from reallm.planner.problem.problem import Candidate, Problem

from .knapsack import ROUNDING, Floats, Instance, Ints, relax_knapsack, solve_knapsack
from .p_median import Medians, medians

Flags = NDArray[np.bool_]
UNDECIDED, YES, NO = 0, 1, -1
PRICES = 8
"""Prices that the first bound with few formats is looked for at."""
FIRST_STEPS, STEPS = 400, 60
"""Of a node's subgradients: with no multipliers to start from, and with its parent's."""


@dataclass(frozen=True, slots=True)
class Node:
    """What is decided: of every codebook and of every format, UNDECIDED, YES or NO; and the price to bound it at."""

    books: NDArray[np.int8]
    formats: NDArray[np.int8]
    price: float
    bound: float = 0.0
    medians: Medians | None = None
    """Of the last bound, where formats must still go."""

    def with_book(self, book: int, state: int) -> Node:
        """The same with one codebook decided."""
        books = self.books.copy()
        books[book] = state
        return replace(self, books=books)

    def with_format(self, name: int, state: int) -> Node:
        """The same with one format decided."""
        formats = self.formats.copy()
        formats[name] = state
        return replace(self, formats=formats)


@dataclass(frozen=True, slots=True)
class Found:
    """The cheapest choices, the best first; a proven lower bound; the price of a byte; whether all was searched."""

    choices: tuple[list[Candidate], ...]
    bound: float
    price: float
    finished: bool
    nodes: int
    """Bounded, in all."""


class Search:
    """A depth-first search of one problem without limits, for its `count` cheapest choices."""

    def __init__(self, problem: Problem, count: int = 1) -> None:
        self.problem, self.count = problem, count
        self.names = sorted({c.format for item in problem.items for c in item.candidates})
        self.keys = list(problem.shared)
        self.sizes = np.array([problem.shared[key] for key in self.keys], np.int64)
        column = {name: f for f, name in enumerate(self.names)}
        shape = (len(problem.items), len(self.names))
        self.cost, self.nbytes = np.full(shape, inf), np.zeros(shape, np.int64)
        self.needs = np.zeros((len(self.keys), *shape), np.bool_)
        for i, item in enumerate(problem.items):
            for c in item.candidates:
                self.cost[i, column[c.format]], self.nbytes[i, column[c.format]] = c.cost, c.nbytes
                for key in c.shared:
                    self.needs[self.keys.index(key), i, column[c.format]] = True
        self.best: dict[tuple[int, ...], tuple[float, int]] = {}
        """Choices by columns -> (cost, bytes)."""
        self.price, self.nodes, self.unproved = 0.0, 0, inf

    @property
    def ceiling(self) -> float:
        """No choice dearer than this is wanted."""
        costs = sorted(cost for cost, _ in self.best.values())
        return costs[self.count - 1] if len(costs) >= self.count else inf

    def run(self, time_limit_s: float) -> Found | None:
        """Search until all is proved or time runs out, maybe without a choice; None when no choice fits."""
        until = time.monotonic() + time_limit_s
        root = self.bounded(self.root())
        stack = [root] if root else []
        while stack:
            node = stack.pop()
            if node.bound > self.ceiling + self._tolerance(node):
                continue
            if time.monotonic() > until:
                self.unproved = min(self.unproved, node.bound, *(other.bound for other in stack))
                break
            stack.extend(filter(None, map(self.bounded, self._children(node))))
        ranked = sorted(self.best.items(), key=lambda entry: (*entry[1], entry[0]))[: self.count]
        if not ranked:
            return None if isinf(self.unproved) else Found((), self.unproved, 0.0, False, self.nodes)
        bound = min(ranked[0][1][0], self.unproved)
        choices = tuple(self._choice(picks) for picks, _ in ranked)
        return Found(choices, bound, self.price, isinf(self.unproved), self.nodes)

    def root(self) -> Node:
        """Nothing decided."""
        return Node(np.zeros(len(self.keys), np.int8), np.zeros(len(self.names), np.int8), 0.0)

    def _tolerance(self, node: Node) -> float:
        return ROUNDING * (node.bound + node.price * self.problem.capacity)

    def _keep(self, picks: Ints, price: float) -> bool:
        """Note a choice and the price it was found at, if it fits; whether it does."""
        rows = np.arange(len(picks))
        stored = sum(
            size for size, need in zip(self.sizes.tolist(), self.needs, strict=True) if need[rows, picks].any()
        )
        found = fsum(self.cost[rows, picks].tolist()), int(self.nbytes[rows, picks].sum()) + stored
        if found[1] > self.problem.capacity:
            return False
        if found < min(self.best.values(), default=(inf, 0)):
            self.price = price
        self.best[tuple(picks.tolist())] = found
        return True

    def _choice(self, picks: tuple[int, ...]) -> list[Candidate]:
        pairs = zip(self.problem.items, picks, strict=True)
        return self.problem.by_names({item.name: self.names[f] for item, f in pairs})

    def _alive(self, node: Node) -> Flags:
        """[items, formats] that may still be chosen."""
        alive: Flags = np.isfinite(self.cost) & (node.formats != NO)
        for need in self.needs[node.books == NO]:
            alive &= ~need
        return alive

    def _left(self, node: Node) -> int:
        """Bytes that the stored codebooks leave."""
        return self.problem.capacity - int(self.sizes[node.books == YES].sum())

    def _instance(self, node: Node) -> Instance | None:
        """The knapsack of what may be chosen, undecided codebooks free of charge; None when some item has nothing."""
        alive = self._alive(node)
        if not alive.any(1).all():
            return None
        return Instance(np.where(alive, self.cost, inf), np.where(alive, self.nbytes, 0))

    def bounded(self, node: Node) -> Node | None:
        """The node with its bound and a price that is good for it, or None where nothing in it can matter."""
        self.nodes += 1
        instance, left = self._instance(node), self._left(node)
        if instance is None or instance.total(instance.lightest)[1] > left:
            return None
        if self._surplus(node, instance) > 0:
            return self._bounded_by_medians(node, instance)
        bound = max(node.bound, self._bound(node, instance, node.price))
        if bound <= self.ceiling:
            for _ in range(2):
                paid = Instance(instance.cost, instance.nbytes + self._shares(node, instance, node.price))
                if paid.total(paid.lightest)[1] > left:
                    return None
                relaxed = relax_knapsack(paid, left)
                node = replace(node, price=relaxed.price)
                bound = max(bound, self._bound(node, instance, relaxed.price))
        return self._wanted(replace(node, bound=bound))

    def _wanted(self, node: Node) -> Node | None:
        """The node, if something good enough can be in it."""
        return None if isinf(node.bound) or node.bound > self.ceiling + self._tolerance(node) else node

    def _bounded_by_medians(self, node: Node, instance: Instance) -> Node | None:
        """`bounded` where formats must still go; decides those that the bound decides."""
        left, most = self._left(node), self.problem.max_formats
        assert most is not None
        forced, price, best = node.formats == YES, node.price, node.medians
        if forced.sum() > most:
            return None
        if best is None:
            price = relax_knapsack(instance, left).price
        most_bound = -inf
        for _ in range(PRICES if best is None else 1):
            value = instance.cost + price * (instance.nbytes + self._shares(node, instance, price))
            steps = FIRST_STEPS if best is None else STEPS
            found = medians(value, forced, most, None if best is None else best.multipliers, steps)
            if (bound := _difference(found.bound, price * left)) > most_bound:
                most_bound, best = bound, found
                node = replace(node, bound=max(bound, node.bound), price=price, medians=found)
            price = self._price_of(found.chosen, instance, left, price, found.best - price * left)
        return self._wanted(self._decided(node, instance))

    def _price_of(self, chosen: Flags, instance: Instance, left: int, price: float, least: float) -> float:
        """The price at which the formats `chosen` just fit, a higher one where they never do; keeps their best choice.

        `least` is a bound of what they cost.
        """
        cost = np.where(chosen, instance.cost, inf)
        if not np.isfinite(cost).any(1).all():
            return price
        few = Instance(cost, instance.nbytes)
        if few.total(few.lightest)[1] > left:
            return 1.5 * price if price else 1.0 / max(self.problem.capacity, 1)
        if least < self.ceiling and not self.needs.any() and (answer := solve_knapsack(few, left)) is not None:
            self._keep(answer.picks[0], answer.price)
            return answer.price
        return relax_knapsack(few, left).price

    def _decided(self, node: Node, instance: Instance) -> Node:
        """The node with every format decided of which the other decision is dearer than the ceiling."""
        found = node.medians
        assert found is not None
        open_, tolerance = (node.formats == UNDECIDED) & np.isfinite(instance.cost).any(0), self._tolerance(node)
        inside, outside = open_ & found.taken, open_ & ~found.taken
        spare = self.ceiling + tolerance - _difference(found.bound, node.price * self._left(node))
        formats = node.formats.copy()
        next_in = float(found.rho[outside].min(initial=inf))
        last_in = float(found.rho[inside].max(initial=-inf))
        formats[inside & (next_in - found.rho > spare)] = YES
        formats[outside & (found.rho - last_in > spare)] = NO
        if (formats == YES).sum() == self.problem.max_formats:
            formats[formats == UNDECIDED] = NO
        return replace(node, formats=formats)

    def _shares(self, node: Node, instance: Instance, price: float) -> Ints:
        """[items, formats]: bytes of undecided codebooks that each candidate pays."""
        shares = np.zeros(instance.cost.shape, np.int64)
        for book in np.flatnonzero(node.books == UNDECIDED).tolist():
            need = self.needs[book]
            saved = self._saved(need, instance.cost + price * (instance.nbytes + shares))
            if (must := np.isinf(saved)).any():
                saved = must.astype(np.float64)
            if (total := saved.sum()) > 0:
                shares += need * np.floor(float(self.sizes[book]) * (saved / total)).astype(np.int64)[:, None]
        return shares

    @staticmethod
    def _saved(need: Flags, value: Floats) -> Floats:
        """[items]: what a codebook that the candidates of `need` use saves each item; inf where there is no other."""
        own, others = np.where(need, value, inf).min(1), np.where(need, inf, value).min(1)
        return np.where(own < others, others - np.where(np.isfinite(own), own, 0.0), 0.0)

    def _bound(self, node: Node, instance: Instance, price: float) -> float:
        """The node's bound at a price, however many formats there are."""
        value = instance.cost + price * (instance.nbytes + self._shares(node, instance, price))
        return _difference(fsum(value.min(1).tolist()), price * self._left(node))

    def _surplus(self, node: Node, instance: Instance) -> int:
        """How many formats must still go."""
        if self.problem.max_formats is None:
            return 0
        return int(np.isfinite(instance.cost).any(0).sum()) - self.problem.max_formats

    def _children(self, node: Node) -> list[Node]:
        """Both decisions of what matters most, the better one last; none where the node is solved or cannot matter."""
        if (instance := self._instance(node)) is None:
            return []
        if self._surplus(node, instance) > 0:
            assert node.medians is not None
            present = np.isfinite(instance.cost).any(0) & (node.formats == UNDECIDED)
            name = int(np.where(present, node.medians.rho, inf).argmin())
            return [node.with_format(name, NO), node.with_format(name, YES)]
        shares = self._shares(node, instance, node.price)
        if self._solved(node, Instance(instance.cost, instance.nbytes + shares)):
            return []
        undecided = np.flatnonzero(node.books == UNDECIDED).tolist()
        value, gains = instance.cost + node.price * (instance.nbytes + shares), {}
        for book in undecided:
            need = self.needs[book]
            free = np.where(need, instance.cost + node.price * instance.nbytes, value)
            gains[book] = float(self._saved(need, free).sum() - node.price * self.sizes[book])
        book = max(gains, key=lambda b: (abs(gains[b]), -b))
        stored, dropped = node.with_book(book, YES), node.with_book(book, NO)
        return [dropped, stored] if gains[book] > 0 else [stored, dropped]

    def _repair(self, node: Node, picks: Ints) -> None:
        """A first choice: the best with the codebooks that `picks` uses and no others."""
        used = self.needs[:, np.arange(len(picks)), picks].any(1)
        books = np.where(node.books == UNDECIDED, np.where(used, YES, NO), node.books).astype(np.int8)
        decided = replace(node, books=books)
        if (instance := self._instance(decided)) is None:
            return
        answer = solve_knapsack(instance, self._left(decided))
        if answer is not None:
            self._keep(answer.picks[0], answer.price)

    def _solved(self, node: Node, instance: Instance) -> bool:
        """Solve the node with undecided codebooks paid in shares; whether nothing better can be in it."""
        answer = solve_knapsack(instance, self._left(node), self.count)
        if answer is None:
            return True
        ceiling, all_fit = self.ceiling, True
        for picks in answer.picks:
            all_fit &= self._keep(picks, answer.price)
        if isinf(ceiling) and not all_fit:
            self._repair(node, answer.picks[0])
        if not (node.books == UNDECIDED).any():
            if not answer.optimal:
                self.unproved = min(self.unproved, max(answer.bound, node.bound))
            return True
        return answer.optimal and (all_fit or answer.bound >= ceiling)


def _difference(value: float, limits_price: float) -> float:
    """`value` - `limits_price`, less what their rounding may have added."""
    return value - limits_price - ROUNDING * (abs(value) + limits_price)
