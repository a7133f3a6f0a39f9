"""Layout: sizes are exact before anything is written and depend only on the set of tensors."""

from __future__ import annotations

import json
from math import prod
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reallm.kernels.storage.dtypes import SAFETENSORS_DTYPES
from reallm.kernels.storage.layout import (
    LENGTH_BYTES,
    OFFSET_DIGITS,
    LayoutError,
    TensorSpec,
    file_bytes,
    file_overhead,
    header_text,
    max_files,
    natural_key,
    plan_shards,
)

names = st.one_of(
    st.from_regex(r"[a-z]{1,9}(\.[0-9]{1,3}){0,2}\.(codes|weight)", fullmatch=True), st.text(min_size=1, max_size=9)
).filter(lambda name: name != "__metadata__")
specs = st.builds(
    TensorSpec,
    names,
    st.sampled_from(sorted(SAFETENSORS_DTYPES.keys() - {"F4"})),
    st.lists(st.integers(0, 70), max_size=3).map(tuple),
) | st.builds(TensorSpec, names, st.just("F4"), st.lists(st.integers(0, 35), max_size=3).map(lambda s: (*s, 2)))


def bits(spec: TensorSpec) -> int:
    return SAFETENSORS_DTYPES[spec.dtype].bits


spec_lists = st.lists(specs, unique_by=lambda spec: spec.name, max_size=12)
shard_sizes = st.sampled_from((1, 1000, 100_000, 4 << 30))


@given(spec_lists, shard_sizes)
def test_size_is_the_sum_that_the_planner_adds_up(tensors: list[TensorSpec], max_bytes: int) -> None:
    shards = plan_shards(tensors, max_shard_bytes=max_bytes)
    added = len(shards) * file_overhead() + sum(t.header_bytes + t.nbytes for t in tensors)
    assert file_bytes(tensors, max_shard_bytes=max_bytes) == added
    assert len(shards) <= max_files(sum(t.nbytes for t in tensors), max_bytes)
    assert all(len(header_text(s)) + LENGTH_BYTES + sum(t.nbytes for t in s.tensors) == s.nbytes for s in shards)


@given(spec_lists, shard_sizes, st.randoms(use_true_random=False))
def test_layout_ignores_the_order_of_the_list(tensors: list[TensorSpec], max_bytes: int, shuffle: Random) -> None:
    shuffled = list(tensors)
    shuffle.shuffle(shuffled)
    assert plan_shards(shuffled, max_shard_bytes=max_bytes) == plan_shards(tensors, max_shard_bytes=max_bytes)


@given(spec_lists, shard_sizes)
def test_every_tensor_is_aligned(tensors: list[TensorSpec], max_bytes: int) -> None:
    for shard in plan_shards(tensors, max_shard_bytes=max_bytes):
        start = LENGTH_BYTES + shard.header_bytes
        assert start % 64 == 0
        for spec in shard.tensors:
            assert start % (64 if spec.nbytes % 64 == 0 else max(8, bits(spec)) // 8) == 0
            start += spec.nbytes


@given(spec_lists, shard_sizes)
def test_shards_keep_to_their_limit_and_lose_nothing(tensors: list[TensorSpec], max_bytes: int) -> None:
    shards = plan_shards(tensors, max_shard_bytes=max_bytes)
    assert sorted(t.name for s in shards for t in s.tensors) == sorted(t.name for t in tensors)
    for shard in shards:
        sizes = [t.nbytes for t in shard.tensors if t.nbytes]
        assert sum(sizes) <= max_bytes or len(sizes) == 1


@given(spec_lists)
def test_header_is_json_with_contiguous_offsets(tensors: list[TensorSpec]) -> None:
    (shard,) = plan_shards(tensors)
    header = json.loads(header_text(shard))
    assert header.pop("__metadata__") == {"format": "reallm"}
    end = 0
    for spec in shard.tensors:
        entry = header.pop(spec.name)
        assert entry["data_offsets"][0] == end
        end += prod(spec.shape) * bits(spec) // 8
        assert entry == {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [entry["data_offsets"][0], end],
        }
    assert not header


def test_a_size_by_hand() -> None:
    # {"__metadata__":{"format":"reallm"}} is 36 bytes, with the length 44 -> 64. The entry
    # "a.codes":{"dtype":"U8","shape":[128],"data_offsets":[0,128]} is 61; with two offsets of 13 digits and a comma 84.
    assert file_overhead() == 64
    spec = TensorSpec("a.codes", "U8", (128,))
    assert OFFSET_DIGITS == 13 and spec.header_bytes == 128
    assert file_bytes([spec]) == 64 + 128 + 128
    assert file_bytes([]) == 64


def test_blocks_sort_by_number() -> None:
    ordered = sorted(["h.10.a", "h.2.b", "h.2.a", "h.x", "h"], key=natural_key)
    assert ordered == ["h", "h.2.a", "h.2.b", "h.10.a", "h.x"]


def test_impossible_tensors_are_refused() -> None:
    with pytest.raises(LayoutError, match="unknown dtype 'U3'; expected one of"):
        TensorSpec("a", "U3", (1,))
    for name, shape in (("", (1,)), ("__metadata__", (1,)), ("a", (-1,))):
        with pytest.raises(LayoutError, match="be stored"):
            TensorSpec(name, "U8", shape)
    with pytest.raises(LayoutError, match="'a' appears twice"):
        plan_shards([TensorSpec("a", "U8", (1,)), TensorSpec("b", "U8", (1,)), TensorSpec("a", "F32", (1,))])
    with pytest.raises(LayoutError, match="exceed what one file holds"):
        plan_shards([TensorSpec("a", "U8", (10**13,))])
