"""A lower bound for a limited number of formats: the Lagrangian relaxation of the p-median problem.

Sets        i in I: items; f in F: formats; R, a subset of F: forced formats, which must be in use
Data        value[i,f]: cost of item i in format f, inf where it cannot have f;  max_formats
Variables   S, a subset of F: the formats in use
Objective   min  sum_i min over f in S of value[i,f]
Constraints R is a subset of S;  |S| <= max_formats

With a multiplier v[i] for the constraint that item i has a format, and rho[f] = sum_i min(0, value[i,f] - v[i]), no set
S costs less than

    sum_i v[i]  +  sum of rho[f] over R  +  sum of the max_formats - |R| smallest other rho[f]

(Cornuejols, Fisher and Nemhauser 1977). v is improved by subgradient steps. The sets that attain the bounds on the way
are good choices of S.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import fsum, inf

import numpy as np
from numpy.typing import NDArray

from .knapsack import ROUNDING, Floats

Flags = NDArray[np.bool_]
FIRST_STEP, MIN_STEP, PATIENCE = 1.0, 0.02, 10
"""A step aims to close a fraction of the gap between the bound and the cost of the best set. The fraction starts at
FIRST_STEP, is halved after PATIENCE steps without a better bound, and ends the search below MIN_STEP."""


@dataclass(frozen=True, slots=True)
class MedianBound:
    """The best bound, the multipliers that give it, and the cheapest set of formats seen."""

    bound: float
    multipliers: Floats
    """v [items]."""
    rho: Floats
    """rho [formats]."""
    taken: Flags
    """[formats]: whether rho of a format is part of the bound."""
    best: float
    """Cost of `chosen`; inf if no set seen has a format for every item."""
    chosen: Flags
    """[formats]: the cheapest set seen."""


def median_bound(value: Floats, forced: Flags, max_formats: int, start: Floats | None, steps: int) -> MedianBound:
    """The best bound found in at most `steps` subgradient steps from the multipliers `start` (None for the defaults).

    `value` [items, formats], `forced` [formats]. Formats without a finite value are never in use.
    """
    present = np.array(np.isfinite(value).any(0))
    v = _first_multipliers(value) if start is None else start
    result: MedianBound | None = None
    best, chosen, step, idle = inf, forced, FIRST_STEP, 0
    for _ in range(steps):
        below = np.minimum(value - v[:, None], 0.0)
        rho = below.sum(0)
        taken = _taken(rho, forced, present, max_formats)
        bound = fsum(v.tolist()) + float(rho[taken].sum())
        bound -= ROUNDING * (float(np.abs(v).sum()) - float(rho[taken].sum()))  # large terms may cancel
        cost = float(value[:, taken].min(1, initial=inf).sum())
        if cost < best:
            best, chosen = cost, taken
        if result is None or bound > result.bound:
            result, idle = MedianBound(bound, v, rho, taken, best, chosen), 0
        else:
            idle += 1
        if idle >= PATIENCE:
            step, idle, v = step / 2, 0, result.multipliers
        slope = 1.0 - (below[:, taken] < 0).sum(1)
        squared_norm = float(slope @ slope)
        target = best if np.isfinite(best) else bound + abs(bound)
        if squared_norm == 0 or step < MIN_STEP or target <= result.bound:
            break
        v = v + step * max(target - bound, 0.0) / squared_norm * slope
    assert result is not None
    return replace(result, best=best, chosen=chosen)


def _first_multipliers(value: Floats) -> Floats:
    """[items]: the second smallest value of each item; the smallest one where it is the only one."""
    low = np.sort(value, 1)
    second = low[:, min(1, low.shape[1] - 1)]
    return np.where(np.isfinite(second), second, low[:, 0])


def _taken(rho: Floats, forced: Flags, present: Flags, max_formats: int) -> Flags:
    """[formats]: True for the forced formats and for those with the smallest rho, `max_formats` in total."""
    taken = forced & present
    others = np.flatnonzero(present & ~forced)
    room = max(max_formats - int(taken.sum()), 0)
    taken[others[np.argsort(rho[others], kind="stable")[:room]]] = True
    return taken
