"""The allocation problem without models or tensors: choose one candidate per item, within a capacity and other limits.

An item is a matrix, or several tied matrices that must share a format. A candidate may need shared codebooks, each of
which is paid for once. A limit is a further budget, of bytes on one device or of time, and each candidate uses a part
of it. The number of different formats may be limited too. Items and candidates are kept in a canonical order, so that
no result depends on the order of the input.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import fsum, isfinite
from typing import Literal

from reallm.kernels.storage.layout import natural_key


@dataclass(frozen=True, slots=True, order=True)
class Candidate:
    """One way to store an item."""

    nbytes: int
    """Bytes that the budget counts, without shared codebooks."""
    cost: float
    """Predicted loss, nats per token."""
    format: str
    shared: tuple[str, ...] = ()
    """Keys of the shared codebooks that it needs."""
    uses: tuple[int, ...] = ()
    """How much it uses of each of the problem's limits, in their order."""

    def __post_init__(self) -> None:
        if self.nbytes < 0 or not isfinite(self.cost) or self.cost < 0 or any(use < 0 for use in self.uses):
            raise ValueError(
                f"candidate {self.format} has {self.nbytes} bytes, cost {self.cost} and uses {self.uses}; "
                "expected finite numbers of 0 or more"
            )

    def dominates(self, other: Candidate) -> bool:
        """Whether this candidate is never worse than `other`: no more bytes, cost, use of any limit, or codebooks."""
        lighter = self.nbytes <= other.nbytes and all(a <= b for a, b in zip(self.uses, other.uses, strict=True))
        return lighter and self.cost <= other.cost and set(self.shared) <= set(other.shared)


@dataclass(frozen=True, slots=True)
class Limit:
    """A further budget: `capacity` units of something that candidates and shared codebooks use."""

    name: str
    unit: Literal["bytes", "ns"]
    capacity: int
    shared: Mapping[str, int] = field(default_factory=dict)
    """Key of a shared codebook -> how much of the limit it uses, counted once; missing keys use 0."""


@dataclass(frozen=True, slots=True)
class Item:
    """One decision: the candidates to choose from."""

    name: str
    candidates: tuple[Candidate, ...]

    def __post_init__(self) -> None:
        names = [c.format for c in self.candidates]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"{self.name} has the candidates {names}; expected at least one, and each format once")
        object.__setattr__(self, "candidates", tuple(sorted(self.candidates)))


@dataclass(frozen=True, slots=True)
class Problem:
    """Choose one candidate per item so that the cost is minimal.

    The bytes of the chosen candidates and of the codebooks they need must stay within `capacity`, and what they use of
    each limit within that limit. At most `max_formats` different formats may be chosen (None: any number).
    """

    items: tuple[Item, ...]
    shared: Mapping[str, int]
    """Key -> bytes of each shared codebook."""
    capacity: int
    limits: tuple[Limit, ...] = ()
    max_formats: int | None = None

    def __post_init__(self) -> None:
        if len({item.name for item in self.items}) != len(self.items):
            raise ValueError("two items have the same name")
        keys = {key for item in self.items for c in item.candidates for key in c.shared}
        if missing := sorted(keys - set(self.shared)):
            raise ValueError(f"shared codebook {missing[0]!r} has no size")
        if any(len(c.uses) != len(self.limits) for item in self.items for c in item.candidates):
            raise ValueError("a candidate must say what it uses of each limit")
        object.__setattr__(self, "items", tuple(sorted(self.items, key=lambda item: natural_key(item.name))))
        object.__setattr__(self, "shared", {key: self.shared[key] for key in sorted(keys)})

    def nbytes(self, chosen: Sequence[Candidate]) -> int:
        """Exact bytes of a choice, each shared codebook counted once."""
        return sum(c.nbytes for c in chosen) + sum(self.shared[key] for key in needed_codebooks(chosen))

    def limit_use(self, chosen: Sequence[Candidate], index: int) -> int:
        """How much a choice uses of `limits[index]`, each shared codebook counted once."""
        shared = self.limits[index].shared
        return sum(c.uses[index] for c in chosen) + sum(shared.get(key, 0) for key in needed_codebooks(chosen))

    def fits(self, chosen: Sequence[Candidate]) -> bool:
        """Whether a choice stays within the capacity, every limit and the maximum number of formats."""
        within_limits = all(self.limit_use(chosen, i) <= limit.capacity for i, limit in enumerate(self.limits))
        few_enough = self.max_formats is None or len({c.format for c in chosen}) <= self.max_formats
        return within_limits and few_enough and self.nbytes(chosen) <= self.capacity

    @property
    def is_knapsack(self) -> bool:
        """Whether this is a multiple-choice knapsack: one budget, no shared codebooks, any number of formats."""
        return not self.shared and not self.limits and self.max_formats is None

    def cost(self, chosen: Sequence[Candidate]) -> float:
        """Total cost of a choice: the exact sum of the candidates' costs, rounded once."""
        return fsum(c.cost for c in chosen)

    def by_item(self, chosen: Sequence[Candidate]) -> dict[str, Candidate]:
        """Item name -> candidate of a choice."""
        return {item.name: candidate for item, candidate in zip(self.items, chosen, strict=True)}

    def choice_of(self, formats: Mapping[str, str]) -> list[Candidate]:
        """The choice that gives every item the format named for it in `formats`."""
        return [next(c for c in item.candidates if c.format == formats[item.name]) for item in self.items]

    def pruned(self) -> Problem:
        """The same problem without dominated candidates; the optimum is the same.

        With a limited number of formats nothing is removed: a dominated format may be in use for other items anyway.
        """
        if self.max_formats is not None:
            return self
        return replace(self, items=tuple(Item(i.name, _undominated(i.candidates)) for i in self.items))


def needed_codebooks(chosen: Iterable[Candidate]) -> set[str]:
    """Keys of the shared codebooks that a choice needs."""
    return {key for c in chosen for key in c.shared}


def _undominated(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    undominated: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.nbytes, c.cost, len(c.shared), c.format)):
        if not any(other.dominates(candidate) for other in undominated):
            undominated.append(candidate)
    return tuple(undominated)
