"""What a budget in bytes leaves for the matrices, around the sizes at which one more file may be needed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from strategies import make_table

from reallm.kernels.storage.layout import MAX_SHARD_BYTES, file_overhead, max_files
from reallm.planner.problem.plan_options import PlanOptions
from reallm.planner.problem.selection import Selection, select

near_boundaries = st.builds(
    lambda shards, offset: max(shards * MAX_SHARD_BYTES + offset, 1), st.integers(0, 5), st.integers(-2000, 2000)
)


def selection() -> Selection:
    return select(make_table(("l.0.q", 16, 64, "linear", {"int4-g8": 0.5})), "file", PlanOptions())


@given(near_boundaries, st.integers(1, 700))
def test_more_bytes_never_leave_less(nbytes: int, more: int) -> None:
    chosen = selection()
    assert chosen.problem(nbytes).capacity <= chosen.problem(nbytes + more).capacity


@given(near_boundaries)
def test_what_is_left_always_fits_the_files(nbytes: int) -> None:
    chosen = selection()
    left = chosen.problem(nbytes).capacity
    if left > 0:
        # The most expensive case: as many files as this much data can fill.
        used = left + sum(spec_bytes(chosen))
        assert used + file_overhead() * max_files(used) <= nbytes


@given(near_boundaries)
def test_the_smallest_budget_leaves_just_enough(item_bytes: int) -> None:
    chosen = selection()
    smallest = chosen.smallest_budget(item_bytes)
    assert chosen.problem(smallest).capacity >= item_bytes > chosen.problem(smallest - 1).capacity


def spec_bytes(chosen: Selection) -> list[int]:
    """Data and header bytes of norm.weight bf16 [17] and blocks.0.norm.weight bf16 [3, 5], which every file has."""
    assert dict(chosen.table.other_tensors) == {"norm.weight": (17,), "blocks.0.norm.weight": (3, 5)}
    return [34 + 128, 30 + 128]
