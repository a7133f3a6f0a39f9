"""A first solution with few formats: the formats that are missed least go, one after the other, then swaps.

Dropping format f from all items raises the Lagrangian bound at the price p of a byte by

    sum_i ( min over c not of f of value[i,c]  -  min over c of value[i,c] ),    value = cost + p * weight

so the format with the least of these goes; p is found again after each. Every set so reached is a problem of its own,
solved exactly where one budget is all there is. It only gives the integer programme a good start.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import numpy as np

from reallm.planner.problem.problem import Candidate, Item, Problem

from .lagrangian import relax, shadow_price

Solve = Callable[[Problem], list[Candidate] | None]


def few_formats(problem: Problem, most: int, prices: tuple[float, ...], solve: Solve) -> list[Candidate] | None:
    """A choice of at most `most` formats by `solve` (given problems without that limit); None when none was found."""
    names = sorted({c.format for item in problem.items for c in item.candidates})
    kept = set(names)
    while len(kept) > most:
        missed = _missed(problem, kept, prices)
        if missed is None:
            return None
        kept.discard(missed)
    best = _solved(problem, kept, solve)
    while best is not None and (swap := _swap(problem, best, kept, prices, solve)) is not None:
        best, kept = swap
    return best


def _swap(
    problem: Problem, best: list[Candidate], kept: set[str], prices: tuple[float, ...], solve: Solve
) -> tuple[list[Candidate], set[str]] | None:
    """A better choice with one format of `kept` swapped for another, and its formats; None when there is none."""
    names = sorted({c.format for item in problem.items for c in item.candidates} - kept)
    for old in sorted(kept):
        for new in names:
            swapped = kept - {old} | {new}
            if _bound(problem, swapped, prices) >= problem.cost(best):
                continue
            other = _solved(problem, swapped, solve)
            if other is not None and problem.cost(other) < problem.cost(best):
                return other, swapped
    return None


def _within(problem: Problem, kept: Collection[str]) -> Problem | None:
    rows = [tuple(c for c in item.candidates if c.format in kept) for item in problem.items]
    if not all(rows):
        return None
    items = tuple(Item(item.name, row) for item, row in zip(problem.items, rows, strict=True))
    return replace(problem, items=items, max_formats=None)


def _solved(problem: Problem, kept: Collection[str], solve: Solve) -> list[Candidate] | None:
    inner = _within(problem, kept)
    return None if inner is None else solve(inner)


def _bound(problem: Problem, kept: Collection[str], prices: tuple[float, ...]) -> float:
    inner = _within(problem, kept)
    if inner is None:
        return float("inf")
    relaxation = relax(inner, prices)
    price = shadow_price(relaxation)
    value = relaxation.cost + price * relaxation.weight
    least = float(np.minimum.reduceat(value, relaxation.starts).sum())
    return least - price * problem.capacity - float(relaxation.limits_price)


def _missed(problem: Problem, kept: Collection[str], prices: tuple[float, ...]) -> str | None:
    """The format of `kept` whose loss costs least; None when every one of them is some item's last."""
    inner = _within(problem, kept)
    if inner is None:
        return None
    relaxation = relax(inner, prices)
    value = relaxation.cost + shadow_price(relaxation) * relaxation.weight
    formats = np.array([c.format for item in inner.items for c in item.candidates])
    least = np.minimum.reduceat(value, relaxation.starts)
    losses = {}
    for name in sorted(kept):
        without = np.minimum.reduceat(np.where(formats == name, np.inf, value), relaxation.starts)
        losses[name] = float((without - least).sum())
    missed = min(losses, key=lambda name: (losses[name], name))
    return missed if np.isfinite(losses[missed]) else None
