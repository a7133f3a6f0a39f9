"""A first solution with few formats: drop the least useful formats one after another, then try to swap some.

Sets        i in I: items; c in C[i]: their candidates; K: the formats still allowed
Data        value[i,c] = cost[i,c] + p * weight[i,c] at the price p per byte;  max_formats
Step        drop the f in K with the smallest

    sum_i ( min over c not of format f of value[i,c]  -  min over c of value[i,c] ),

which is how much dropping f from all items raises the Lagrangian bound. p is computed again after each step. With
max_formats left, the problem with only these formats is solved (exactly if it is a knapsack), and formats are swapped
while that lowers the cost. This is a heuristic: it only gives the integer program a good start.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import numpy as np

from reallm.planner.problem.problem import Candidate, Item, Problem

from .lagrangian import relax, shadow_price

Solve = Callable[[Problem], list[Candidate] | None]
"""Function that returns an optimal or at least good choice for a problem, or None when nothing fits."""


def few_formats(problem: Problem, max_formats: int, prices: tuple[float, ...], solve: Solve) -> list[Candidate] | None:
    """A choice with at most `max_formats` formats; None when none was found.

    `prices` [limits] holds the price of one unit of each limit. `solve` is only called on problems without a limit on
    the number of formats.
    """
    names = sorted({c.format for item in problem.items for c in item.candidates})
    allowed = set(names)
    while len(allowed) > max_formats:
        format_to_drop = _least_useful(problem, allowed, prices)
        if format_to_drop is None:
            return None
        allowed.discard(format_to_drop)
    best = _solved(problem, allowed, solve)
    while best is not None and (swap := _better_swap(problem, best, allowed, prices, solve)) is not None:
        best, allowed = swap
    return best


def _better_swap(
    problem: Problem, best: list[Candidate], allowed: set[str], prices: tuple[float, ...], solve: Solve
) -> tuple[list[Candidate], set[str]] | None:
    """A better choice, found by swapping one allowed format for another, and the formats then allowed; None if none."""
    names = sorted({c.format for item in problem.items for c in item.candidates} - allowed)
    for old in sorted(allowed):
        for new in names:
            swapped = allowed - {old} | {new}
            if _bound(problem, swapped, prices) >= problem.cost(best):
                continue
            other = _solved(problem, swapped, solve)
            if other is not None and problem.cost(other) < problem.cost(best):
                return other, swapped
    return None


def _restricted(problem: Problem, allowed: Collection[str]) -> Problem | None:
    """`problem` with only the allowed formats and no limit on their number; None when an item has no allowed format."""
    rows = [tuple(c for c in item.candidates if c.format in allowed) for item in problem.items]
    if not all(rows):
        return None
    items = tuple(Item(item.name, row) for item, row in zip(problem.items, rows, strict=True))
    return replace(problem, items=items, max_formats=None)


def _solved(problem: Problem, allowed: Collection[str], solve: Solve) -> list[Candidate] | None:
    restricted = _restricted(problem, allowed)
    return None if restricted is None else solve(restricted)


def _bound(problem: Problem, allowed: Collection[str], prices: tuple[float, ...]) -> float:
    """A lower bound of the cost with only the allowed formats."""
    restricted = _restricted(problem, allowed)
    if restricted is None:
        return float("inf")
    relaxation = relax(restricted, prices)
    price = shadow_price(relaxation)
    value = relaxation.cost + price * relaxation.weight
    lowest = float(np.minimum.reduceat(value, relaxation.starts).sum())
    return lowest - price * problem.capacity - float(relaxation.limits_price)


def _least_useful(problem: Problem, allowed: Collection[str], prices: tuple[float, ...]) -> str | None:
    """The allowed format that is cheapest to drop; None if every one is the only candidate of some item."""
    restricted = _restricted(problem, allowed)
    if restricted is None:
        return None
    relaxation = relax(restricted, prices)
    value = relaxation.cost + shadow_price(relaxation) * relaxation.weight
    formats = np.array([c.format for item in restricted.items for c in item.candidates])
    lowest = np.minimum.reduceat(value, relaxation.starts)
    increases = {}
    for name in sorted(allowed):
        without = np.minimum.reduceat(np.where(formats == name, np.inf, value), relaxation.starts)
        increases[name] = float((without - lowest).sum())
    cheapest = min(increases, key=lambda name: (increases[name], name))
    return cheapest if np.isfinite(increases[cheapest]) else None
