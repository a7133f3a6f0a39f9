"""The decode step as a graph and as C++: golden texts, and what the verifier refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny import tiny_model

from reallm.codegen.decode_step.emit_cpp import emit_step
from reallm.codegen.decode_step.graph import StepGraph, Value
from reallm.codegen.decode_step.operations import Add, Embed, Gate, Linear, Norm, Token, Weight
from reallm.codegen.decode_step.passes import CPU_PASSES, fold_permutations, group_linears, run_step_passes
from reallm.codegen.decode_step.verify import verify_step
from reallm.codegen.ir.operations import CodegenError
from reallm.runtime.step.model_reader import read_step

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
def test_the_graph_before_and_after_the_passes_is_the_golden_one(architecture: str) -> None:
    graph = read_step(tiny_model(architecture))
    text = f"{graph}\n{run_step_passes(graph)}"
    assert text == (GOLDEN / f"step-{architecture}.txt").read_text(encoding="utf-8")


def test_the_source_is_the_golden_one_and_the_same_every_time() -> None:
    first, second = (emit_step(run_step_passes(read_step(tiny_model("llama")))) for _ in range(2))
    assert first == second
    assert first.source == (GOLDEN / "step-llama.cpp").read_text(encoding="utf-8")


def test_layers_that_are_alike_become_one_function() -> None:
    source = emit_step(run_step_passes(read_step(tiny_model("llama", settings={"num_hidden_layers": 7})))).source
    assert source.count("void block") == 4  # embedding, first norm, layer, head
    assert "for (int i = 0; i < 7; i++) block2(" in source


def test_an_unfused_graph_has_no_source() -> None:
    with pytest.raises(CodegenError, match="run the passes first"):
        emit_step(read_step(tiny_model("llama")))


def started() -> tuple[StepGraph, Value]:
    """A graph with an embedding of 8 values."""
    graph = StepGraph("Tiny")
    return graph, graph.add("embed", Embed(Weight("embed", 10, 8, "f32"), 1.0), graph.add("token", Token()))


def linear(name: str, cols: int = 8, transform: str = "") -> Linear:
    return Linear((Weight(name, 4, cols, "f32", transform=transform),))


def test_a_value_of_the_wrong_width_is_refused() -> None:
    graph, x = started()
    graph.add("head", linear("head", cols=6), x)
    with pytest.raises(CodegenError, match=r"head = .* reads values of widths \(8,\), not \(6,\)"):
        verify_step(graph)


def test_a_value_that_nothing_reads_is_refused() -> None:
    graph, x = started()
    graph.add("lost", Norm("w", 8, 1e-6, False), x)
    graph.add("head", linear("head"), x)
    with pytest.raises(CodegenError, match="nothing reads lost"):
        verify_step(graph)


def test_two_nodes_of_one_name_are_refused() -> None:
    graph, x = started()
    with pytest.raises(CodegenError, match="two nodes called 'embed'"):
        graph.add("embed", Add(8), x, x)


def test_matrices_that_transform_their_input_apart_stay_apart() -> None:
    graph, x = started()
    parts = [graph.add(n, linear(n, transform=t), x) for n, t in (("a", "rotated"), ("b", ""), ("c", "rotated"))]
    total = graph.add("sum", Add(4), parts[0], parts[1])
    graph.add("all", Add(4), total, parts[2])
    group_linears(graph)
    verify_step(graph)
    assert [len(op.weights) for _, op in graph if isinstance(op, Linear)] == [2, 1]
    assert graph.inputs("all") == (Value("sum"), Value("a", 1))


def gated(down: Weight, *others: Weight) -> StepGraph:
    """The embedding, gated by itself, read by `down` and `others`, whose sum are the logits."""
    graph, x = started()
    value = graph.add("gate", Gate("silu", 8), x, x)
    total = graph.add("down", Linear((down,)), value)
    for other in others:
        total = graph.add(f"with {other.name}", Add(4), total, graph.add(other.name, Linear((other,)), value))
    return graph


def test_a_gate_writes_in_the_order_of_the_only_matrix_that_reads_it() -> None:
    permuted = Weight("w", 4, 8, "int4-g4+perm", permuted=True)
    graph = run_step_passes(gated(permuted), CPU_PASSES)
    assert "silu gate in the order of w" in str(graph) and "int4-g4+perm, its input in order" in str(graph)
    for other in (
        gated(permuted, Weight("v", 4, 8, "f32", transform="none")),
        gated(replace(permuted, permuted=False)),
    ):
        text = str(other)
        fold_permutations(other)
        assert str(other) == text
