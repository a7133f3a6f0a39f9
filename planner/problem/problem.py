"""The allocation problem, free of models: one candidate for each item, within a capacity of bytes and other limits.

An item is a matrix, or several tied ones that must share a format. A candidate may need shared codebooks, which are
paid for once. A limit is a further budget, of bytes on one device or of time, and a candidate uses so much of each. The
formats in use may be limited in number too. Items and candidates are kept in a canonical order, so nothing depends on
the order they came in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import fsum, isfinite
from typing import Literal

from reallm.kernels.storage.layout import natural_key


@dataclass(frozen=True, slots=True, order=True)
class Candidate:
    """One way of storing an item: bytes of what the budget counts, cost, format name, keys of shared codebooks.

    `uses` has how much it takes of each of the problem's limits, in their order.
    """

    nbytes: int
    cost: float
    format: str
    shared: tuple[str, ...] = ()
    uses: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.nbytes < 0 or not isfinite(self.cost) or self.cost < 0 or any(use < 0 for use in self.uses):
            raise ValueError(f"candidate {self.format}: {self.nbytes} bytes at cost {self.cost} cannot be")

    def dominates(self, other: Candidate) -> bool:
        """Never worse than `other`: no more bytes, cost or use of a limit, no codebook that `other` does not need."""
        lighter = self.nbytes <= other.nbytes and all(a <= b for a, b in zip(self.uses, other.uses, strict=True))
        return lighter and self.cost <= other.cost and set(self.shared) <= set(other.shared)


@dataclass(frozen=True, slots=True)
class Limit:
    """A further budget: `capacity` units of something that candidates and shared codebooks use."""

    name: str
    unit: Literal["bytes", "ns"]
    capacity: int
    shared: Mapping[str, int] = field(default_factory=dict)
    """Key of a shared codebook -> what it uses once; 0 where it is not named."""


@dataclass(frozen=True, slots=True)
class Item:
    """One decision."""

    name: str
    candidates: tuple[Candidate, ...]

    def __post_init__(self) -> None:
        names = [c.format for c in self.candidates]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"{self.name} needs one candidate or more, each format once, not {names}")
        object.__setattr__(self, "candidates", tuple(sorted(self.candidates)))


@dataclass(frozen=True, slots=True)
class Problem:
    """Choose one candidate per item; bytes of the chosen and of the codebooks they need stay within `capacity`.

    So does what they use of every limit, and at most `max_formats` different formats are chosen, None for any number.
    """

    items: tuple[Item, ...]
    shared: Mapping[str, int]
    capacity: int
    limits: tuple[Limit, ...] = ()
    max_formats: int | None = None

    def __post_init__(self) -> None:
        if len({item.name for item in self.items}) != len(self.items):
            raise ValueError("two items have the same name")
        used = {key for item in self.items for c in item.candidates for key in c.shared}
        if missing := sorted(used - set(self.shared)):
            raise ValueError(f"shared codebook {missing[0]!r} has no size")
        if any(len(c.uses) != len(self.limits) for item in self.items for c in item.candidates):
            raise ValueError("a candidate must say what it uses of each limit")
        object.__setattr__(self, "items", tuple(sorted(self.items, key=lambda item: natural_key(item.name))))
        object.__setattr__(self, "shared", {key: self.shared[key] for key in sorted(used)})

    def nbytes(self, chosen: Sequence[Candidate]) -> int:
        """Exact bytes of a choice, shared codebooks once."""
        return sum(c.nbytes for c in chosen) + sum(self.shared[key] for key in needed(chosen))

    def used(self, chosen: Sequence[Candidate], limit: int) -> int:
        """What a choice uses of the limit at index `limit`, shared codebooks once."""
        own = self.limits[limit].shared
        return sum(c.uses[limit] for c in chosen) + sum(own.get(key, 0) for key in needed(chosen))

    def fits(self, chosen: Sequence[Candidate]) -> bool:
        """Whether a choice keeps the capacity, every limit and the number of formats."""
        within = all(self.used(chosen, i) <= limit.capacity for i, limit in enumerate(self.limits))
        few = self.max_formats is None or len({c.format for c in chosen}) <= self.max_formats
        return within and few and self.nbytes(chosen) <= self.capacity

    @property
    def plain(self) -> bool:
        """Whether one budget is all there is: a multiple-choice knapsack."""
        return not self.shared and not self.limits and self.max_formats is None

    def cost(self, chosen: Sequence[Candidate]) -> float:
        """Cost of a choice, the correctly rounded sum."""
        return fsum(c.cost for c in chosen)

    def by_name(self, chosen: Sequence[Candidate]) -> dict[str, Candidate]:
        """A choice by the names of the items."""
        return {item.name: candidate for item, candidate in zip(self.items, chosen, strict=True)}

    def by_names(self, formats: Mapping[str, str]) -> list[Candidate]:
        """The choice of the items' formats by name."""
        return [next(c for c in item.candidates if c.format == formats[item.name]) for item in self.items]

    def pruned(self) -> Problem:
        """The same problem without candidates that another of the same item dominates; its optimum is the same.

        Where formats are counted nothing is left out: a dominated format may be in use elsewhere.
        """
        if self.max_formats is not None:
            return self
        return replace(self, items=tuple(Item(i.name, _undominated(i.candidates)) for i in self.items))


def needed(chosen: Iterable[Candidate]) -> set[str]:
    """Keys of the shared codebooks that a choice needs."""
    return {key for c in chosen for key in c.shared}


def _undominated(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.nbytes, c.cost, len(c.shared), c.format)):
        if not any(other.dominates(candidate) for other in kept):
            kept.append(candidate)
    return tuple(kept)
