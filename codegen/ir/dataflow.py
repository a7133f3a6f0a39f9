"""Which matrices of a model multiply the same vector, told from their names as transformers' decoders have them.

A name that is not known shares its input with nothing, which costs a kernel and is never wrong.
"""

from __future__ import annotations

from collections.abc import Iterable

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Last parts of the names of modules that one parent gives the same input: attention's and a gated MLP's."""


def shared_inputs(names: Iterable[str]) -> dict[str, str]:
    """Matrix -> its input: equal for matrices that share one, the matrix's own name where none is known to."""
    result = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        group = next((group for group in SIBLINGS if last in group), None)
        result[name] = f"{parent}.({'|'.join(group)})" if group else name
    return result


def siblings(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The matrices of `names` that share their input with others of them, together, in the order models call them."""
    together: dict[str, list[str]] = {}
    for name, shared in shared_inputs(names).items():
        together.setdefault(shared, []).append(name)
    order = {last: index for group in SIBLINGS for index, last in enumerate(group)}
    return [
        tuple(sorted(found, key=lambda name: order[name.rpartition(".")[2]]))
        for found in together.values()
        if len(found) > 1
    ]
