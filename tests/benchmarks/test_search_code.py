"""The Triton search compiles for GPUs that are not here, without spills or atomics, and its machine code is counted."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is an extra")

from machine_code.sass import lint
from machine_code.search_code import compile_search, search_cost


@pytest.mark.parametrize("architecture", [80, 90])
def test_the_search_is_clean_machine_code(architecture: int) -> None:
    code, shared = compile_search(architecture, 12, 4, feedback=True)
    assert lint(code, product=False) == ()
    assert shared < 48 << 10


def test_instructions_are_counted_for_every_turn_of_the_loops() -> None:
    cost = search_cost(80, 8, 4)
    # 384 steps of 8 states for each of 32 threads, at 10 to 25 instructions a state and step, and the walks back
    assert 384 * 8 * 32 * 10 < cost.instructions_per_weight * 256 < 384 * 8 * 32 * 25
    assert 0 < cost.alu_per_weight < cost.instructions_per_weight
    assert cost.pointer_bytes_per_weight == 4 * 64 * (16 + 8) / 256
