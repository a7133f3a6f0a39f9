"""Buffers: places in the scratch area for the values of a decode step, reused once their values are no longer needed.

Buffers are taken and released in the order of the graph, so that every layer uses the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from .graph import StepGraph, Value
from .operations import Operation

BUFFER_FLOATS = 16
"""Widths of buffers are rounded up to a multiple of this, one cache line."""


class Buffers:
    """Places of the live values: offsets in the scratch area, in floats per token.

    `order` lists the operations in the order in which they will run.
    """

    def __init__(self, graph: StepGraph, order: Sequence[tuple[str, Operation]]) -> None:
        self.graph = graph
        self.total = 0
        """Size of the scratch area in floats per token."""
        self.free: dict[int, list[int]] = {}
        """Width -> free places of this width."""
        self.places: dict[Value, int] = {}
        self.last_use: dict[Value, int] = {}
        for index, (name, _) in enumerate(order):
            self.last_use |= dict.fromkeys(graph.inputs(name), index)

    def take(self, index: int, value: Value, replaced: Value | None = None) -> int:
        """Reserve and return a place for `value`.

        It is the place of `replaced`, if operation `index` is the last to read `replaced` and the widths agree.
        """
        width = self.graph.width(value)
        if replaced is not None and self.last_use[replaced] == index and self.graph.width(replaced) == width:
            self.places[value] = self.places[replaced]
        else:
            self.places[value] = self._new(width)
        return self.places[value]

    def _new(self, width: int) -> int:
        if idle := self.free.get(width):
            idle.remove(place := min(idle))
        else:
            place, self.total = self.total, self.total + -(-width // BUFFER_FLOATS) * BUFFER_FLOATS
        return place

    def release(self, index: int, name: str) -> None:
        """Free the places that are unused after operation `index`, the node `name`.

        These are the places of its inputs that no later operation reads, and of its outputs that nothing reads.
        """
        outputs = [Value(name, port) for port in range(len(self.graph.op(name).outputs))]
        for value in [*dict.fromkeys(self.graph.inputs(name)), *outputs]:
            if value in self.places and self.last_use.get(value, index) <= index:
                place, width = self.places.pop(value), self.graph.width(value)
                if place not in self.places.values() and value != self.graph.logits:
                    self.free.setdefault(width, []).append(place)
