"""Finds the matrices of a model that multiply the same vector, from the names that transformers' decoders give them.

A matrix with an unknown name is assumed to share its input with no other. That is always correct, and costs at most an
extra kernel launch.
"""

from __future__ import annotations

from collections.abc import Iterable

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Modules that get the same input from their parent (attention, gated MLP), by the last part of their names."""


def shared_inputs(names: Iterable[str]) -> dict[str, str]:
    """A map from each matrix to the name of its input; matrices with the same input get the same name."""
    result = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        group = next((group for group in SAME_INPUT if last in group), None)
        result[name] = f"{parent}.({'|'.join(group)})" if group else name
    return result


def input_groups(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Groups of two or more matrices among `names` that share an input, each in the order in which models call them."""
    by_input: dict[str, list[str]] = {}
    for name, shared in shared_inputs(names).items():
        by_input.setdefault(shared, []).append(name)
    order = {last: index for group in SAME_INPUT for index, last in enumerate(group)}
    return [
        tuple(sorted(group, key=lambda name: order[name.rpartition(".")[2]]))
        for group in by_input.values()
        if len(group) > 1
    ]
