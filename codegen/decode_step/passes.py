"""The passes over the graph of a decode step: each leaves a graph that computes the same, with fewer trips to memory
and fewer meetings of the threads. The verifier runs before the first and after every one.

1. group_linears    matrices that read one value through one transform become one node: the input is transformed once,
                    the threads meet once (q, k and v; gate and up).
2. fuse_residuals   h + y, the norm that may lie on y, and the norm of the sum become one node with two outputs.
3. fuse_attention   norms and rotations of query and key move into the attention, which reads its inputs head by head.

and on the CPU alone (a GPU's kernels permute as they read)

4. fold_permutations   a matrix whose columns are stored in another order gets its input in that order from the gate or
                       the attention that makes it and is read by nothing else (down_proj, o_proj).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

from .graph import Add, Attend, Attention, Gate, Linear, Norm, Residual, Rotary, StepGraph, Value, verify_step


def group_linears(graph: StepGraph) -> None:
    """Linears that read the same value and want the same transform of it become one."""
    groups: dict[tuple[Value, str], list[str]] = defaultdict(list)
    for name, op in graph:
        if isinstance(op, Linear) and len(op.weights) == 1:
            groups[graph.inputs(name)[0], op.weights[0].transform].append(name)
    for (value, _), (first, *others) in groups.items():
        if not others:
            continue
        weights = tuple(weight for name in (first, *others) for weight in _linear(graph, name).weights)
        graph.replace(first, Linear(weights), (value,))
        for port, name in enumerate(others, start=1):
            graph.redirect(Value(name), Value(first, port))
            graph.network.remove_node(name)


def _linear(graph: StepGraph, name: str) -> Linear:
    op = graph.op(name)
    assert isinstance(op, Linear)
    return op


def _sole_source(graph: StepGraph, value: Value, kind: type) -> str | None:
    """The node that gives `value`, if it is of `kind` and nothing else reads it."""
    return value.node if isinstance(graph.op(value.node), kind) and len(graph.readers(value)) == 1 else None


def fuse_residuals(graph: StepGraph) -> None:
    """norm(h + y) and norm(h + post(y)) become Residual nodes, whose first output is the sum."""
    for name, op in list(graph):
        readers = graph.readers(Value(name)) if isinstance(op, Add) else []
        norms = [node for node, _ in readers if isinstance(found := graph.op(node), Norm) and found.groups == 1]
        if len(norms) != 1:
            continue
        norm = graph.op(norms[0])
        assert isinstance(norm, Norm)
        h, y = graph.inputs(name)
        post = None
        if source := _sole_source(graph, y, Norm):
            found = graph.op(source)
            assert isinstance(found, Norm)
            post, (y,) = found, graph.inputs(source)
        graph.replace(name, Residual(norm, post), (h, y))
        if post is not None and source:
            graph.network.remove_node(source)
        graph.redirect(Value(norms[0]), Value(name, 1))
        graph.network.remove_node(norms[0])


def fuse_attention(graph: StepGraph) -> None:
    """Rotary of query and key, and the norms of their heads before it, become part of the attention."""
    for name, op in list(graph):
        if not isinstance(op, Attention):
            continue
        query, key, value = graph.inputs(name)
        rotations = [_sole_source(graph, each, Rotary) for each in (query, key)]
        if None in rotations:
            continue
        found = [_through(graph, rotation) for rotation in rotations if rotation]
        (table, query, query_norm, gone), (other, key, key_norm, gone_too) = found
        if table == other:
            graph.replace(name, Attend(op, table, query_norm, key_norm), (query, key, value))
            graph.network.remove_nodes_from([*gone, *gone_too])


def _through(graph: StepGraph, rotation: str) -> tuple[str, Value, Norm | None, list[str]]:
    """(table, what goes in, the norm of its heads, the nodes that vanish) of a rotation."""
    op = graph.op(rotation)
    assert isinstance(op, Rotary)
    (value,) = graph.inputs(rotation)
    source = _sole_source(graph, value, Norm)
    if source is None:
        return op.table, value, None, [rotation]
    norm = graph.op(source)
    assert isinstance(norm, Norm)
    return op.table, graph.inputs(source)[0], norm, [rotation, source]


def fold_permutations(graph: StepGraph) -> None:
    """The gate or the attention before a permuted matrix writes in the order of its stored columns."""
    for name, op in list(graph):
        if not isinstance(op, Linear) or len(op.weights) != 1 or not op.weights[0].permuted:
            continue
        (value,), weight = graph.inputs(name), op.weights[0]
        source = graph.op(value.node)
        if isinstance(source, Gate | Attend) and len(graph.readers(value)) == 1:
            graph.replace(value.node, replace(source, order=weight.name), graph.inputs(value.node))
            graph.replace(name, Linear((replace(weight, permuted=False, ordered=True),)), (value,))


Passes = tuple[Callable[[StepGraph], None], ...]
PASSES: Passes = (group_linears, fuse_residuals, fuse_attention)
CPU_PASSES: Passes = (*PASSES, fold_permutations)


def run_step_passes(graph: StepGraph, passes: Passes = PASSES) -> StepGraph:
    """`passes` in order, in place, the verifier between them. Raises CodegenError for a graph that does not fit."""
    verify_step(graph)
    for change in passes:
        change(graph)
        verify_step(graph)
    return graph
