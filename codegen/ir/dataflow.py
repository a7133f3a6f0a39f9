"""Which matrices of a model multiply the same vector, told from their names as transformers' decoders have them.

A matrix whose name is not recognised is taken to share its input with none, which costs a kernel and is never wrong.
"""

from __future__ import annotations

from collections.abc import Iterable

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Last parts of the names of modules to which one parent gives the same input: attention and gated MLP."""


def shared_inputs(names: Iterable[str]) -> dict[str, str]:
    """Matrix -> name of its input: equal for matrices that share it, otherwise the name of the matrix itself."""
    result = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        group = next((group for group in SAME_INPUT if last in group), None)
        result[name] = f"{parent}.({'|'.join(group)})" if group else name
    return result


def input_groups(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The groups of two or more matrices of `names` with one input, each in the order in which models call them."""
    by_input: dict[str, list[str]] = {}
    for name, shared in shared_inputs(names).items():
        by_input.setdefault(shared, []).append(name)
    order = {last: index for group in SAME_INPUT for index, last in enumerate(group)}
    return [
        tuple(sorted(group, key=lambda name: order[name.rpartition(".")[2]]))
        for group in by_input.values()
        if len(group) > 1
    ]
