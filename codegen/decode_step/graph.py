"""The decode step of a decoder-only model as a printable dataflow graph, which turns one token into its logits.

A node is one operation; an edge carries one value. A value has the name of its node, followed by the number of the
output if the node has several (`x.1`). `reallm.runtime.step.model_reader` builds the graph of a model, `passes`
rewrites it, `verify` checks it, and `emit_cpp` writes its C++.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import networkx as nx

from reallm.codegen.ir.operations import CodegenError

from .operations import Operation


@dataclass(frozen=True, slots=True)
class Value:
    """An output of a node."""

    node: str
    port: int = 0


@dataclass
class StepGraph:
    """The graph of a decode step. Iterating over it gives (name, operation) of each node in topological order.

    Among the possible orders, the order in which nodes were added is preferred. The node added last gives the logits.
    `network` is a networkx graph: node -> op, edge -> slot (which input of its target) and port (which output of its
    source).
    """

    model: str
    """The class of the model."""
    network: nx.MultiDiGraph = field(default_factory=nx.MultiDiGraph)
    logits: Value = field(default_factory=lambda: Value(""))

    def add(self, name: str, op: Operation, *inputs: Value) -> Value:
        """Add a node that reads `inputs`; returns its first output."""
        if name in self.network:
            raise CodegenError(f"the step of {self.model} has two nodes called {name!r}")
        self.network.add_node(name, op=op, order=self.network.number_of_nodes())
        for slot, value in enumerate(inputs):
            self.network.add_edge(value.node, name, key=slot, port=value.port)
        self.logits = Value(name)
        return self.logits

    def op(self, name: str) -> Operation:
        """The operation of a node."""
        op: Operation = self.network.nodes[name]["op"]
        return op

    def inputs(self, name: str) -> tuple[Value, ...]:
        """The values that a node reads, in order."""
        edges = self.network.in_edges(name, keys=True, data=True)
        by_slot = sorted((slot, source, data["port"]) for source, _, slot, data in edges)
        return tuple(Value(source, port) for _, source, port in by_slot)

    def readers(self, value: Value) -> list[tuple[str, int]]:
        """(node, slot) of every input that reads `value`."""
        edges = self.network.out_edges(value.node, data=True, keys=True)
        return [(target, slot) for _, target, slot, data in edges if data["port"] == value.port]

    def __iter__(self) -> Iterator[tuple[str, Operation]]:
        order = nx.lexicographical_topological_sort(self.network, key=lambda n: self.network.nodes[n]["order"])
        return ((name, self.op(name)) for name in order)

    def replace(self, name: str, op: Operation, inputs: tuple[Value, ...]) -> None:
        """Give a node another operation and other inputs."""
        self.network.remove_edges_from([(s, t, k) for s, t, k in self.network.in_edges(name, keys=True)])
        self.network.nodes[name]["op"] = op
        for slot, value in enumerate(inputs):
            self.network.add_edge(value.node, name, key=slot, port=value.port)

    def redirect(self, old: Value, new: Value) -> None:
        """Let every reader of `old` read `new` instead."""
        for node, slot in self.readers(old):
            self.network.remove_edge(old.node, node, key=slot)
            self.network.add_edge(new.node, node, key=slot, port=new.port)
        if self.logits == old:
            self.logits = new

    def width(self, value: Value) -> int:
        """The number of floats per token of a value."""
        return self.op(value.node).outputs[value.port]

    def label(self, value: Value) -> str:
        """`x`, or `x.1` where the node has several outputs."""
        return f"{value.node}.{value.port}" if len(self.op(value.node).outputs) > 1 else value.node

    def __str__(self) -> str:
        lines = [f"step of {self.model}"]
        for name, op in self:
            values = ", ".join(f"{self.label(Value(name, p))} [{w}]" for p, w in enumerate(op.outputs))
            reads = ", ".join(self.label(value) for value in self.inputs(name))
            lines.append(f"  {values} = {op}" + (f" ({reads})" if reads else ""))
        return "\n".join([*lines, f"  logits {self.label(self.logits)}"]) + "\n"
