"""The allocation problem, free of models: one candidate for each item, within a capacity of bytes.

An item is a matrix, or several tied ones that must share a format. A candidate may need shared codebooks, which are
paid for once. Items and candidates are kept in a canonical order, so nothing depends on the order they came in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum, isfinite

from ..kernels.layout import natural_key


@dataclass(frozen=True, slots=True, order=True)
class Candidate:
    """One way of storing an item: bytes of what the budget counts, cost, format name, keys of shared codebooks."""

    nbytes: int
    cost: float
    format: str
    shared: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.nbytes < 0 or not isfinite(self.cost) or self.cost < 0:
            raise ValueError(f"candidate {self.format}: {self.nbytes} bytes at cost {self.cost} cannot be")

    def dominates(self, other: Candidate) -> bool:
        """Never worse than `other`: no more bytes, no more cost, no codebook that `other` does not need."""
        return self.nbytes <= other.nbytes and self.cost <= other.cost and set(self.shared) <= set(other.shared)


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
    """Choose one candidate per item; bytes of the chosen and of the codebooks they need stay within `capacity`."""

    items: tuple[Item, ...]
    shared: Mapping[str, int]
    capacity: int

    def __post_init__(self) -> None:
        if len({item.name for item in self.items}) != len(self.items):
            raise ValueError("two items have the same name")
        used = {key for item in self.items for c in item.candidates for key in c.shared}
        if missing := sorted(used - set(self.shared)):
            raise ValueError(f"shared codebook {missing[0]!r} has no size")
        object.__setattr__(self, "items", tuple(sorted(self.items, key=lambda item: natural_key(item.name))))
        object.__setattr__(self, "shared", {key: self.shared[key] for key in sorted(used)})

    def nbytes(self, chosen: Sequence[Candidate]) -> int:
        """Exact bytes of a choice, shared codebooks once."""
        return sum(c.nbytes for c in chosen) + sum(self.shared[key] for key in needed(chosen))

    def cost(self, chosen: Sequence[Candidate]) -> float:
        """Cost of a choice, the correctly rounded sum."""
        return fsum(c.cost for c in chosen)

    def by_name(self, chosen: Sequence[Candidate]) -> dict[str, Candidate]:
        """A choice by the names of the items."""
        return {item.name: candidate for item, candidate in zip(self.items, chosen, strict=True)}

    def pruned(self) -> Problem:
        """The same problem without candidates that another of the same item dominates; its optimum is the same."""
        return Problem(tuple(Item(i.name, _undominated(i.candidates)) for i in self.items), self.shared, self.capacity)


def needed(chosen: Iterable[Candidate]) -> set[str]:
    """Keys of the shared codebooks that a choice needs."""
    return {key for c in chosen for key in c.shared}


def _undominated(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.nbytes, c.cost, len(c.shared), c.format)):
        if not any(other.dominates(candidate) for other in kept):
            kept.append(candidate)
    return tuple(kept)
