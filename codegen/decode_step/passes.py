"""The passes over the graph of a decode step.

After each pass the graph computes the same result with fewer memory accesses and fewer barriers between threads. The
verifier runs before the first pass and after every one.

1. group_linears    matrices that read the same value through the same transform (q, k and v; gate and up) become one
                    node, so that the input is transformed once and the threads synchronise once.
2. fuse_residuals   h + y, the norm of y if there is one, and the norm of the sum become one node with two outputs.
3. fuse_attention   norms and rotations of query and key move into the attention, which reads its inputs head by head.

Only on the CPU (GPU kernels permute x while they read it):

4. fold_permutations   if the columns of a matrix (down_proj, o_proj) are stored in another order, the gate or attention
                       that computes its input writes the input in that order, unless another node reads it too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

from .graph import StepGraph, Value
from .operations import Add, Attend, Attention, Gate, Linear, Norm, Residual, Rotary
from .verify import verify_step


def group_linears(graph: StepGraph) -> None:
    """Merge the Linear nodes that read the same value through the same transform."""
    groups: dict[tuple[Value, str], list[str]] = defaultdict(list)
    for name, op in graph:
        if isinstance(op, Linear) and len(op.weights) == 1:
            groups[graph.inputs(name)[0], op.weights[0].transform].append(name)
    for (value, _transform), (first, *others) in groups.items():
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
    """Name of the node that gives `value`, if its operation is a `kind` and `value` has only one reader; else None."""
    return value.node if isinstance(graph.op(value.node), kind) and len(graph.readers(value)) == 1 else None


def fuse_residuals(graph: StepGraph) -> None:
    """Replace norm(h + y) and norm(h + post(y)) by Residual nodes, whose first output is the sum."""
    for name, op in list(graph):
        readers = graph.readers(Value(name)) if isinstance(op, Add) else []
        norms = [node for node, _ in readers if isinstance(reader := graph.op(node), Norm) and reader.groups == 1]
        if len(norms) != 1:
            continue
        norm = graph.op(norms[0])
        assert isinstance(norm, Norm)
        h, y = graph.inputs(name)
        post = None
        if source := _sole_source(graph, y, Norm):
            source_op = graph.op(source)
            assert isinstance(source_op, Norm)
            post, (y,) = source_op, graph.inputs(source)
        graph.replace(name, Residual(norm, post), (h, y))
        if post is not None and source:
            graph.network.remove_node(source)
        graph.redirect(Value(norms[0]), Value(name, 1))
        graph.network.remove_node(norms[0])


def fuse_attention(graph: StepGraph) -> None:
    """Make the rotations of query and key, and the head norms before them, part of the attention."""
    for name, op in list(graph):
        if not isinstance(op, Attention):
            continue
        query, key, value = graph.inputs(name)
        rotations = [_sole_source(graph, each, Rotary) for each in (query, key)]
        if None in rotations:
            continue
        chains = [_rotation_chain(graph, rotation) for rotation in rotations if rotation]
        (table, query, query_norm, query_nodes), (key_table, key, key_norm, key_nodes) = chains
        if table == key_table:
            graph.replace(name, Attend(op, table, query_norm, key_norm), (query, key, value))
            graph.network.remove_nodes_from([*query_nodes, *key_nodes])


def _rotation_chain(graph: StepGraph, rotation: str) -> tuple[str, Value, Norm | None, list[str]]:
    """(table, input, the head norm before the rotation if there is one, nodes to remove) for the node `rotation`."""
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
    """Let the gate or attention before a permuted matrix write in the order of the matrix's stored columns."""
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
    """Run `passes` on `graph`, which they change in place, and return it. Raises CodegenError for an invalid graph.

    The verifier runs before the first pass and after every one.
    """
    verify_step(graph)
    for change in passes:
        change(graph)
        verify_step(graph)
    return graph
