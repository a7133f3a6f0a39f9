"""Exact branch and bound for shared codebooks or few formats: decide these until a plain knapsack is left.

Sets        i in I: items; f in F: formats; d in D: shared codebooks
Data        cost[i,f] >= 0; bytes[i,f]; D[i,f]: the codebooks that item i needs in format f; size[d]; capacity;
            max_formats
Variables   f_i in F: the format of item i
Objective   min  sum_i cost[i,f_i]
Constraints budget:   sum_i bytes[i,f_i] + sum of size[d] over the codebooks needed <= capacity
            formats:  at most max_formats different f_i

A node of the search has decided for some codebooks whether they are stored (and paid for), and for some formats whether
they may be used. For any price p per byte, every choice within the node costs at least

    sum_i min_f value[i,f]  -  p (capacity - size of the stored codebooks),     value = cost + p (bytes + shares).

The shares pay for the undecided codebooks. They are whole bytes, at most size[d] in total over all items, and
proportional to what the codebook saves each item. With such shares, either all items that a
codebook helps use it, or none do. If no item is helped by two codebooks, the bound is as tight as it would be after the
right decision. While too many formats may still be used, the bound of `p_median` replaces the sum. A node with nothing
left to decide is a multiple-choice knapsack, which `knapsack` solves.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from math import fsum, inf, isinf

import numpy as np
from numpy.typing import NDArray

from reallm.planner.problem.problem import Candidate, Problem

from .knapsack import ROUNDING, Floats, Instance, Ints, relax_knapsack, solve_knapsack
from .p_median import MedianBound, median_bound

Flags = NDArray[np.bool_]
UNDECIDED, YES, NO = 0, 1, -1
"""Decisions of a node: YES stores a codebook or allows a format, NO rules it out."""
PRICES = 8
"""Number of prices at which the bound of the first node is computed when the number of formats is limited."""
FIRST_STEPS, STEPS = 400, 60
"""Maximum number of subgradient steps: in a node without multipliers to start from, and in one with its parent's."""


@dataclass(frozen=True, slots=True)
class Node:
    """A part of the search space: the decisions made so far, and a lower bound of the cost within it."""

    books: NDArray[np.int8]
    """For each codebook: UNDECIDED, YES or NO."""
    formats: NDArray[np.int8]
    """For each format: UNDECIDED, YES or NO."""
    price: float
    """The price per byte at which the bound is computed."""
    bound: float = 0.0
    medians: MedianBound | None = None
    """The last p-median bound, if too many formats may still be used."""

    def with_book(self, book: int, state: int) -> Node:
        """A copy of the node in which the decision on codebook `book` is `state`."""
        books = self.books.copy()
        books[book] = state
        return replace(self, books=books)

    def with_format(self, name: int, state: int) -> Node:
        """A copy of the node in which the decision on format `name` is `state`."""
        formats = self.formats.copy()
        formats[name] = state
        return replace(self, formats=formats)


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The cheapest choices and what is proved about them."""

    choices: tuple[list[Candidate], ...]
    """The choices found, by rising cost."""
    bound: float
    """Proven lower bound of the cost of any choice."""
    price: float
    """Cost per byte at which the best choice was found."""
    finished: bool
    """Whether the whole space was searched."""
    nodes: int
    """Number of nodes for which a bound was computed."""


class Search:
    """A depth-first search for the `count` cheapest choices of a problem without limits."""

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
        """Choice, given as the format index of each item -> (cost, bytes)."""
        self.price, self.nodes, self.unproved = 0.0, 0, inf

    @property
    def ceiling(self) -> float:
        """The cost of the `count`-th cheapest known choice; choices that cost more are of no interest."""
        costs = sorted(cost for cost, _ in self.best.values())
        return costs[self.count - 1] if len(costs) >= self.count else inf

    def run(self, time_limit_s: float) -> SearchResult | None:
        """Search until everything is proved or the time limit is reached.

        Returns None when no choice fits. At the time limit, the result may not contain a choice.
        """
        deadline = time.monotonic() + time_limit_s
        root = self.bounded(self.root())
        stack = [root] if root else []
        while stack:
            node = stack.pop()
            if node.bound > self.ceiling + self._tolerance(node):
                continue
            if time.monotonic() > deadline:
                self.unproved = min(self.unproved, node.bound, *(other.bound for other in stack))
                break
            stack.extend(filter(None, map(self.bounded, self._children(node))))
        ranked = sorted(self.best.items(), key=lambda entry: (*entry[1], entry[0]))[: self.count]
        if not ranked:
            return None if isinf(self.unproved) else SearchResult((), self.unproved, 0.0, False, self.nodes)
        bound = min(ranked[0][1][0], self.unproved)
        choices = tuple(self._choice(picks) for picks, _ in ranked)
        return SearchResult(choices, bound, self.price, isinf(self.unproved), self.nodes)

    def root(self) -> Node:
        """The node in which nothing is decided."""
        return Node(np.zeros(len(self.keys), np.int8), np.zeros(len(self.names), np.int8), 0.0)

    def _tolerance(self, node: Node) -> float:
        return ROUNDING * (node.bound + node.price * self.problem.capacity)

    def _record(self, picks: Ints, price: float) -> bool:
        """If a choice fits, record it and the price at which it was found; return whether it fits."""
        rows = np.arange(len(picks))
        stored = sum(
            size for size, need in zip(self.sizes.tolist(), self.needs, strict=True) if need[rows, picks].any()
        )
        totals = fsum(self.cost[rows, picks].tolist()), int(self.nbytes[rows, picks].sum()) + stored
        if totals[1] > self.problem.capacity:
            return False
        if totals < min(self.best.values(), default=(inf, 0)):
            self.price = price
        self.best[tuple(picks.tolist())] = totals
        return True

    def _choice(self, picks: tuple[int, ...]) -> list[Candidate]:
        pairs = zip(self.problem.items, picks, strict=True)
        return self.problem.choice_of({item.name: self.names[f] for item, f in pairs})

    def _alive(self, node: Node) -> Flags:
        """[items, formats]: whether the item may still be given the format in the node."""
        alive: Flags = np.isfinite(self.cost) & (node.formats != NO)
        for need in self.needs[node.books == NO]:
            alive &= ~need
        return alive

    def _bytes_left(self, node: Node) -> int:
        """Bytes of the capacity that are left after the stored codebooks."""
        return self.problem.capacity - int(self.sizes[node.books == YES].sum())

    def _instance(self, node: Node) -> Instance | None:
        """The knapsack of the allowed candidates, with undecided codebooks free; None if an item has none left."""
        alive = self._alive(node)
        if not alive.any(1).all():
            return None
        return Instance(np.where(alive, self.cost, inf), np.where(alive, self.nbytes, 0))

    def bounded(self, node: Node) -> Node | None:
        """The node with its bound and a good price for it; None when all its choices cost more than the ceiling."""
        self.nodes += 1
        instance, left = self._instance(node), self._bytes_left(node)
        if instance is None or instance.total(instance.lightest)[1] > left:
            return None
        if self._excess_formats(node, instance) > 0:
            return self._bounded_by_p_median(node, instance)
        bound = max(node.bound, self._bound(node, instance, node.price))
        if bound <= self.ceiling:
            for _ in range(2):
                paid = Instance(instance.cost, instance.nbytes + self._shares(node, instance, node.price))
                if paid.total(paid.lightest)[1] > left:
                    return None
                relaxed = relax_knapsack(paid, left)
                node = replace(node, price=relaxed.price)
                bound = max(bound, self._bound(node, instance, relaxed.price))
        return self._unless_hopeless(replace(node, bound=bound))

    def _unless_hopeless(self, node: Node) -> Node | None:
        """The node; None if every choice in it costs more than the ceiling."""
        return None if isinf(node.bound) or node.bound > self.ceiling + self._tolerance(node) else node

    def _bounded_by_p_median(self, node: Node, instance: Instance) -> Node | None:
        """`bounded` for a node with too many formats; also decides the formats that the bound decides."""
        left, max_formats = self._bytes_left(node), self.problem.max_formats
        assert max_formats is not None
        forced, price, best = node.formats == YES, node.price, node.medians
        if forced.sum() > max_formats:
            return None
        if best is None:
            price = relax_knapsack(instance, left).price
        best_bound = -inf
        for _ in range(PRICES if best is None else 1):
            value = instance.cost + price * (instance.nbytes + self._shares(node, instance, price))
            steps = FIRST_STEPS if best is None else STEPS
            medians = median_bound(value, forced, max_formats, None if best is None else best.multipliers, steps)
            if (bound := _difference_below(medians.bound, price * left)) > best_bound:
                best_bound, best = bound, medians
                node = replace(node, bound=max(bound, node.bound), price=price, medians=medians)
            price = self._price_for_formats(medians.chosen, instance, left, price, medians.best - price * left)
        return self._unless_hopeless(self._with_implied_formats(node, instance))

    def _price_for_formats(
        self, chosen: Flags, instance: Instance, left: int, price: float, lower_bound: float
    ) -> float:
        """The price at which the cheapest choice of the formats `chosen` just fits; a higher price if none fits.

        Also records the best choice that uses only these formats. It skips this if any candidate needs a shared
        codebook, or if `lower_bound` (a lower bound on the cost of that choice) is not below the ceiling.
        """
        cost = np.where(chosen, instance.cost, inf)
        if not np.isfinite(cost).any(1).all():
            return price
        few = Instance(cost, instance.nbytes)
        if few.total(few.lightest)[1] > left:
            return 1.5 * price if price else 1.0 / max(self.problem.capacity, 1)
        if lower_bound < self.ceiling and not self.needs.any() and (answer := solve_knapsack(few, left)) is not None:
            self._record(answer.picks[0], answer.price)
            return answer.price
        return relax_knapsack(few, left).price

    def _with_implied_formats(self, node: Node, instance: Instance) -> Node:
        """The node after deciding each format for which the opposite decision would cost more than the ceiling."""
        medians = node.medians
        assert medians is not None
        open_, tolerance = (node.formats == UNDECIDED) & np.isfinite(instance.cost).any(0), self._tolerance(node)
        inside, outside = open_ & medians.taken, open_ & ~medians.taken
        spare = self.ceiling + tolerance - _difference_below(medians.bound, node.price * self._bytes_left(node))
        formats = node.formats.copy()
        lowest_outside = float(medians.rho[outside].min(initial=inf))
        highest_inside = float(medians.rho[inside].max(initial=-inf))
        formats[inside & (lowest_outside - medians.rho > spare)] = YES
        formats[outside & (medians.rho - highest_inside > spare)] = NO
        if (formats == YES).sum() == self.problem.max_formats:
            formats[formats == UNDECIDED] = NO
        return replace(node, formats=formats)

    def _shares(self, node: Node, instance: Instance, price: float) -> Ints:
        """[items, formats]: the bytes that each candidate pays for undecided codebooks."""
        shares = np.zeros(instance.cost.shape, np.int64)
        for book in np.flatnonzero(node.books == UNDECIDED).tolist():
            need = self.needs[book]
            saved = self._savings(need, instance.cost + price * (instance.nbytes + shares))
            if (must := np.isinf(saved)).any():
                saved = must.astype(np.float64)
            if (total := saved.sum()) > 0:
                shares += need * np.floor(float(self.sizes[book]) * (saved / total)).astype(np.int64)[:, None]
        return shares

    @staticmethod
    def _savings(need: Flags, value: Floats) -> Floats:
        """[items]: what a codebook saves an item if the candidates in `need` use it; inf for an item without others."""
        with_book, without = np.where(need, value, inf).min(1), np.where(need, inf, value).min(1)
        return np.where(with_book < without, without - np.where(np.isfinite(with_book), with_book, 0.0), 0.0)

    def _bound(self, node: Node, instance: Instance, price: float) -> float:
        """The node's lower bound at a price, ignoring the maximum number of formats."""
        value = instance.cost + price * (instance.nbytes + self._shares(node, instance, price))
        return _difference_below(fsum(value.min(1).tolist()), price * self._bytes_left(node))

    def _excess_formats(self, node: Node, instance: Instance) -> int:
        """How many more formats may still be used than `max_formats` (negative for fewer); 0 without a maximum."""
        if self.problem.max_formats is None:
            return 0
        return int(np.isfinite(instance.cost).any(0).sum()) - self.problem.max_formats

    def _children(self, node: Node) -> list[Node]:
        """Two children that decide the most important undecided codebook or format in opposite ways; [] if solved.

        The more promising child is the last one, so the search visits it first.
        """
        if (instance := self._instance(node)) is None:
            return []
        if self._excess_formats(node, instance) > 0:
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
            gains[book] = float(self._savings(need, free).sum() - node.price * self.sizes[book])
        book = max(gains, key=lambda b: (abs(gains[b]), -b))
        stored, dropped = node.with_book(book, YES), node.with_book(book, NO)
        return [dropped, stored] if gains[book] > 0 else [stored, dropped]

    def _record_first_choice(self, node: Node, picks: Ints) -> None:
        """Record a first choice that fits: the best one if exactly the codebooks that `picks` uses are stored."""
        used = self.needs[:, np.arange(len(picks)), picks].any(1)
        books = np.where(node.books == UNDECIDED, np.where(used, YES, NO), node.books).astype(np.int8)
        decided = replace(node, books=books)
        if (instance := self._instance(decided)) is None:
            return
        answer = solve_knapsack(instance, self._bytes_left(decided))
        if answer is not None:
            self._record(answer.picks[0], answer.price)

    def _solved(self, node: Node, instance: Instance) -> bool:
        """Solve the node's knapsack, with shares for undecided codebooks; return whether the node needs no children."""
        answer = solve_knapsack(instance, self._bytes_left(node), self.count)
        if answer is None:
            return True
        ceiling, all_fit = self.ceiling, True
        for picks in answer.picks:
            all_fit &= self._record(picks, answer.price)
        if isinf(ceiling) and not all_fit:
            self._record_first_choice(node, answer.picks[0])
        if not (node.books == UNDECIDED).any():
            if not answer.optimal:
                self.unproved = min(self.unproved, max(answer.bound, node.bound))
            return True
        return answer.optimal and (all_fit or answer.bound >= ceiling)


def _difference_below(value: float, paid: float) -> float:
    """A lower bound of `value` - `paid` that allows for rounding errors."""
    return value - paid - ROUNDING * (abs(value) + paid)
