"""A bound where only few formats may be used: the Lagrangian relaxation of the p-median problem.

Data        value[i,f]: what item i costs in format f, inf where it cannot have it;  most: formats at once
Problem     min over sets F, at most `most` formats and those of `forced` among them, of  sum_i min over f in F of value

With a multiplier v[i] for "item i has a format", and rho[f] = sum_i min(0, value[i,f] - v[i]), no set costs less than

    sum_i v[i]  +  sum of rho over the forced formats  +  the least of the other rho, as many as there is room for

(Cornuejols, Fisher and Nemhauser 1977). v climbs by subgradients; the sets on the way are good ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import fsum, inf

import numpy as np
from numpy.typing import NDArray

from .knapsack import ROUNDING, Floats

Flags = NDArray[np.bool_]
FIRST_STEP, LEAST_STEP, PATIENCE = 1.0, 0.02, 10
"""Of the distance between bound and best set, what a step aims at; halved after PATIENCE steps that gain nothing."""


@dataclass(frozen=True, slots=True)
class Medians:
    """A bound, where it was found, and the cheapest set seen."""

    bound: float
    multipliers: Floats
    """v, [items]."""
    rho: Floats
    """[formats]."""
    taken: Flags
    """[formats]: those in the bound's sum."""
    best: float
    """Cost of `chosen`; inf where no set seen serves every item."""
    chosen: Flags
    """[formats]"""


def medians(value: Floats, forced: Flags, most: int, start: Floats | None, steps: int) -> Medians:
    """The best bound of `steps` steps from the multipliers `start`; formats of no finite value are never taken."""
    present = np.array(np.isfinite(value).any(0))
    v = _first(value) if start is None else start
    found: Medians | None = None
    best, chosen, step, idle = inf, forced, FIRST_STEP, 0
    for _ in range(steps):
        below = np.minimum(value - v[:, None], 0.0)
        rho = below.sum(0)
        taken = _taken(rho, forced, present, most)
        bound = fsum(v.tolist()) + float(rho[taken].sum())
        bound -= ROUNDING * (float(np.abs(v).sum()) - float(rho[taken].sum()))  # large terms may cancel
        cost = float(value[:, taken].min(1, initial=inf).sum())
        if cost < best:
            best, chosen = cost, taken
        if found is None or bound > found.bound:
            found, idle = Medians(bound, v, rho, taken, best, chosen), 0
        else:
            idle += 1
        if idle >= PATIENCE:
            step, idle, v = step / 2, 0, found.multipliers
        slope = 1.0 - (below[:, taken] < 0).sum(1)
        size = float(slope @ slope)
        target = best if np.isfinite(best) else bound + abs(bound)
        if size == 0 or step < LEAST_STEP or target <= found.bound:
            break
        v = v + step * max(target - bound, 0.0) / size * slope
    assert found is not None
    return Medians(found.bound, found.multipliers, found.rho, found.taken, best, chosen)


def _first(value: Floats) -> Floats:
    """The second least value of each item, the least where there is no other."""
    low = np.sort(value, 1)
    second = low[:, min(1, low.shape[1] - 1)]
    return np.where(np.isfinite(second), second, low[:, 0])


def _taken(rho: Floats, forced: Flags, present: Flags, most: int) -> Flags:
    """The forced formats and the others of least rho, `most` in all."""
    taken = forced & present
    others = np.flatnonzero(present & ~forced)
    room = max(most - int(taken.sum()), 0)
    taken[others[np.argsort(rho[others], kind="stable")[:room]]] = True
    return taken
