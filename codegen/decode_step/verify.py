"""The verifier of decode steps: a table of checks, each of which yields what is wrong with a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import networkx as nx

from reallm.codegen.ir.operations import CodegenError

from .graph import StepGraph
from .operations import Attend, Attention, Linear


def verify_step(graph: StepGraph) -> None:
    """Raise CodegenError, naming the node, if `graph` fails one of the CHECKS."""
    for check in CHECKS:
        for fault in check(graph):
            raise CodegenError(f"the step of {graph.model}: {fault}")


def has_no_cycle(graph: StepGraph) -> Iterator[str]:
    """Every value is computed before it is read."""
    if not nx.is_directed_acyclic_graph(graph.network):
        yield "its nodes form a cycle"


def values_fit_their_readers(graph: StepGraph) -> Iterator[str]:
    """The number and the widths of the values that a node reads are those that its operation takes."""
    for name, op in graph:
        widths = tuple(graph.width(value) for value in graph.inputs(name))
        if widths != op.reads:
            yield f"{name} = {op} reads values of widths {widths}, not {op.reads}"


def matrices_of_a_linear_have_equal_columns(graph: StepGraph) -> Iterator[str]:
    """All matrices of one Linear multiply the same value."""
    for name, op in graph:
        if isinstance(op, Linear) and len({weight.cols for weight in op.weights}) != 1:
            yield f"{name} = {op} has matrices of different numbers of columns"


def all_values_are_read(graph: StepGraph) -> Iterator[str]:
    """The output of every node, except the one that gives the logits, is read by another node."""
    for name, op in graph:
        if name != graph.logits.node and not any(graph.network.successors(name)):
            yield f"nothing reads {name} = {op}"


def each_layer_has_one_cache(graph: StepGraph) -> Iterator[str]:
    """Each attention node appends to its own cache; the caches are numbered 0, 1, 2, ..."""
    layers = []
    for _, op in graph:
        attention = op.attention if isinstance(op, Attend) else op
        if isinstance(attention, Attention):
            layers.append(attention.layer)
    if len(set(layers)) != len(layers):
        repeated = next(layer for layer in layers if layers.count(layer) > 1)
        yield f"two nodes append to the cache {repeated}"
    if set(layers) != set(range(len(layers))):
        yield f"its caches are {sorted(layers)}, not one for each layer"


CHECKS: tuple[Callable[[StepGraph], Iterator[str]], ...] = (
    has_no_cycle,
    values_fit_their_readers,
    matrices_of_a_linear_have_equal_columns,
    all_values_are_read,
    each_layer_has_one_cache,
)
