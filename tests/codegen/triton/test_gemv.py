"""Every generated kernel computes the product with the float64 reference decode, under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import interpreted
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed_fields import random_fields, sum_bound

from reallm.codegen.ir.program import Tile
from reallm.kernels.formats.codecs import AdditiveCodec, DoubleQuant, ScalarCodec
from reallm.kernels.formats.formats import Format
from reallm.kernels.formats.terms import LowRank
from reallm.kernels.reference import decode_reference

pytest.importorskip("triton", reason="Triton is an extra")

CAST_ERROR = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-7}
"""Relative error of a cast to the dtype of the activations: rounding, except for bfloat16, which the interpreter
truncates."""
HALF_SUBNORMAL = 2.0**-25
SMALL = Tile(2, 64, 1)
Check = Callable[[interpreted.Call], None]


@pytest.fixture(scope="module")
def check(interpreter: ProcessPoolExecutor) -> Check:
    return lambda call: assert_matches_reference(call, interpreter)


def assert_matches_reference(call: interpreted.Call, pool: ProcessPoolExecutor) -> None:
    fmt = Format.parse(call.format)
    y, x, bias = pool.submit(interpreted.run, call).result(timeout=120)
    shift = np.zeros(call.rows) if bias is None else bias
    expected = x @ decode_reference(fmt, call.packed, call.rows, call.cols).T + shift
    bound = sum_bound(fmt, call.rows, call.cols, call.packed, x) + np.abs(shift) * (call.cols + 100) * 2.0**-24
    if call.dtype != "float32":
        bound = bound + CAST_ERROR[call.dtype] * (np.abs(expected) + bound) + HALF_SUBNORMAL
    excess = np.abs(y - expected) - bound
    assert np.all(excess <= 0), f"{call.format} [{call.rows}, {call.cols}]: {np.nanmax(excess)} over the bound, y {y}"


def random_call(
    name: str, rows: int, cols: int, batch: int, dtype: str = "float32", bias: bool = False, tile: Tile | None = SMALL
) -> interpreted.Call:
    seed = rows * 1000 + cols * 10 + batch
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, cols)).astype(np.float32)
    shift = rng.normal(size=rows).astype(np.float32) if bias else None
    packed = random_fields(Format.parse(name), rows, cols, seed)
    return interpreted.Call(name, rows, cols, dtype, packed, x, shift, tile)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("table", ["int", "uint", "nf", "lm"])
def test_every_scalar_table_and_width(check: Check, table: str, bits: int) -> None:
    for cols in (77, 96):
        check(random_call(f"{table}{bits}-g32", 5, cols, 1))


@pytest.mark.parametrize("group", [0, 8, 24, 100, 192, 4096])
@pytest.mark.parametrize("double", ["", "-dq4x8", "-dq6x64", "-dq8x256"])
def test_every_kind_of_scale(check: Check, group: int, double: str) -> None:
    check(random_call(f"nf3-g{group}{double}", 5, 96, 1))
    check(random_call(f"uint5-g{group}{double}+r8", 3, 77, 2))


@pytest.mark.parametrize("bits", [8, 10, 12])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_number_of_codebooks(check: Check, count: int, bits: int) -> None:
    check(random_call(f"aq{count}x{bits}-d8", 5, 77, 1))
    check(random_call(f"aq{count}x{bits}-d4-shared", 3, 96, 2))


@pytest.mark.parametrize("rank", ["r1", "r8", "r16", "r70", "r8i8", "r16i8"])
def test_every_kind_of_low_rank_term(check: Check, rank: str) -> None:
    check(random_call(f"int4-g64+{rank}", 5, 77, 3, bias=True))
    check(random_call(f"aq2x8-d8+{rank}", 3, 96, 1))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_every_dtype_and_number_of_rows_of_x(check: Check, batch: int, dtype: str) -> None:
    check(random_call("lm3-g32+r8", 5, 96, batch, dtype, bias=True))


@pytest.mark.parametrize(("rows", "cols"), [(5, 576), (1, 1), (9, 1536), (3, 8), (2, 577)])
def test_the_tiles_that_the_rule_chooses(check: Check, rows: int, cols: int) -> None:
    check(random_call("nf4-g64+r16", rows, cols, 2, tile=None))
    check(random_call("aq2x8-d8", rows, cols, 1, tile=None))


@pytest.mark.parametrize("block_n", [1, 4, 16])
@pytest.mark.parametrize("block_k", [64, 256])
def test_tiles_wider_than_the_matrix(check: Check, block_n: int, block_k: int) -> None:
    check(random_call("uint6-g32+r8i8", 7, 104, 2, tile=Tile(block_n, block_k, 1)))


@pytest.mark.parametrize("scale", [2.0**-24, 2.0**-14, 65504.0])
def test_extreme_scales(check: Check, scale: float) -> None:
    call = random_call("int4-g32", 5, 96, 1)
    call.packed["scales"].view("<f2")[: 5 * 3] = scale
    check(call)


def test_zero_scales_give_zero(check: Check) -> None:
    call = random_call("nf4-g32", 5, 96, 1)
    call.packed["scales"][:] = 0
    check(call)


scalars = st.builds(
    ScalarCodec,
    st.sampled_from(["int", "uint", "nf", "lm"]),
    st.sampled_from([2, 3, 4, 5, 6, 8]),
    st.sampled_from([0, 8, 9, 16, 40, 64, 128]),
    st.none() | st.builds(DoubleQuant, st.sampled_from([4, 6, 8]), st.sampled_from([8, 20, 256])),
)
additives = st.builds(
    AdditiveCodec, st.integers(1, 4), st.integers(1, 12), st.sampled_from([2, 4, 8]), shared=st.booleans()
)
low_ranks = st.none() | st.builds(LowRank, st.integers(1, 20), st.sampled_from(["f16", "i8"]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.builds(Format, scalars | additives, low_ranks, st.sampled_from(["", "ldl"])),
    st.integers(1, 6),
    st.integers(1, 150),
    st.integers(1, 4),
    st.sampled_from(["float16", "bfloat16", "float32"]),
    st.booleans(),
    st.sampled_from([SMALL, Tile(4, 128, 1)]),
)
def test_any_format_and_shape(
    check: Check, fmt: Format, rows: int, cols: int, batch: int, dtype: str, bias: bool, tile: Tile
) -> None:
    check(random_call(fmt.name, rows, cols, batch, dtype, bias, tile))
