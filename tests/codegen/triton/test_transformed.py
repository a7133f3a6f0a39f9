"""Generated kernels of trellis, lattice, row-table, rotated and sparse formats compute the reference's product."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import interpreted
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreted import random_call
from strategies import kmeans_codecs, lattice_codecs, sparse_terms

from reallm.codegen.launch.instances import MAX_BATCH
from reallm.kernels.formats.codecs import AnyCodec, ScalarCodec, TrellisCodec
from reallm.kernels.formats.formats import Format
from reallm.kernels.formats.terms import LowRank

pytest.importorskip("triton", reason="Triton is an extra")

Check = Callable[[interpreted.Call], None]


@pytest.fixture(scope="module")
def check(interpreter: ProcessPoolExecutor) -> Check:
    return lambda call: assert_matches_reference(call, interpreter)


def assert_matches_reference(call: interpreted.Call, pool: ProcessPoolExecutor) -> None:
    interpreted.assert_matches(call, *pool.submit(interpreted.run, call).result(timeout=300))


@pytest.mark.parametrize(
    ("rate", "state_bits"), [("1", 12), ("1.5", 16), ("2.25", 8), ("3", 10), ("4.5", 12), ("6", 12), ("6", 16)]
)
def test_trellis_of_every_rate(check: Check, rate: str, state_bits: int) -> None:
    check(random_call(f"tq{rate}-l{state_bits}", 21, 150, 1))


@pytest.mark.parametrize(("rows", "cols"), [(36, 48), (1, 1), (17, 33), (64, 12), (40, 77)])
@pytest.mark.parametrize("batch", [1, 3])
def test_rotations_of_any_order(check: Check, rows: int, cols: int, batch: int) -> None:
    check(random_call("tq2.5-l12+ldl2+rot", rows, cols, batch))


@pytest.mark.parametrize(("rate", "batch"), [("1.5", 5), ("2.5", 16), ("4", 19)])
def test_trellis_of_many_rows_of_x(check: Check, rate: str, batch: int) -> None:
    check(random_call(f"tq{rate}-l12+rot", 33, 77, batch))
    check(random_call(f"tq{rate}-l10", 150, 35, batch, "float16", bias=True))


@pytest.mark.parametrize("name", ["int4-g32", "uint3-g0", "lm3-g24-dq6x64", "aq2x8-d8", "e8p3", "km4", "nf4-g64+rot"])
def test_every_codec_and_many_rows_of_x(check: Check, name: str) -> None:
    check(random_call(name, 70, 96, 17))
    check(random_call(name + "+o10+r3i8", 9, 77, 5, "float16", bias=True))


@pytest.mark.parametrize(
    "name", ["tq3-l12+rot", "tq1.5-l16+o5+r8", "int4-g32+rot", "e8p3+perm", "km3+rot+o5", "aq2x8-d8+cs"]
)
def test_values_that_are_decoded_for_a_library(check: Check, name: str) -> None:
    check(random_call(name, 20, 45, 33))
    check(random_call(name, 24, 48, 33, "float16", bias=True))


@pytest.mark.parametrize("name", ["uint4-g32", "uint3-g0", "lm3-g24-dq6x64", "aq2x8-d8-shared", "e8p4", "km4"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_values_that_are_decoded_to_memory(check: Check, name: str, dtype: str) -> None:
    check(random_call(name, 20, 45, 33, dtype, bias=True))
    if dtype == "float16":  # a GEMM, whose bfloat16 products the interpreter gets wrong
        check(random_call(name + "+r3", 24, 48, 33, dtype))


@pytest.mark.parametrize("name", ["int4-g32", "lm3-g64-dq6x64", "aq2x8-d8", "tq2-l12", "e8p2"])
@pytest.mark.parametrize("transform", ["+perm", "+cs", "+rot", "+perm+cs+rot"])
def test_every_transform(check: Check, name: str, transform: str) -> None:
    check(random_call(name + transform, 12, 77, 2))


@pytest.mark.parametrize("name", ["int4-g32", "lm3-g64-dq6x64", "uint2-g16", "nf4-g128", "lm6-g64", "uint8-g0"])
def test_rows_of_whole_spans_behind_a_transform(check: Check, name: str) -> None:
    check(random_call(name + "+perm+rot+r8i8", 3, 96, 3, bias=True))


@pytest.mark.parametrize("name", ["e8p2", "e8p3", "e8p4", "km2", "km3", "km4"])
def test_lattice_words_and_tables_of_a_row(check: Check, name: str) -> None:
    check(random_call(name, 5, 77, 2))
    check(random_call(name + "+rot+o20+r3i4", 6, 40, 1, bias=True))


@pytest.mark.parametrize("name", ["int4-g32", "aq1x8-d8", "tq2-l10+rot"])
@pytest.mark.parametrize("rest", ["+o5", "+o100+r16i4"])
def test_outliers_and_integer_factors(check: Check, name: str, rest: str) -> None:
    check(random_call(name + rest, 7, 70, 3, bias=True))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("batch", [1, 5])
def test_activations_of_any_size(check: Check, scale: float, batch: int) -> None:
    call = random_call("tq2-l12+rot", 20, 40, batch)
    call.x[:] *= scale
    check(call)


def test_no_activations_give_nothing(check: Check) -> None:
    call = random_call("tq2-l12+rot", 20, 40, 2)
    call.x[:] = 0
    check(call)


codecs: st.SearchStrategy[AnyCodec] = st.one_of(
    st.builds(TrellisCodec, st.integers(8, 48), st.integers(8, 16)),
    lattice_codecs,
    kmeans_codecs,
    st.builds(ScalarCodec, st.sampled_from(["int", "uint", "nf", "lm"]), st.sampled_from([2, 3, 4, 8]), st.just(16)),
)
low_ranks = st.none() | st.builds(LowRank, st.integers(1, 20), st.sampled_from(["f16", "i8", "i4"]))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.builds(
        Format,
        codecs,
        low_ranks,
        permuted=st.booleans(),
        channel_scales=st.booleans(),
        rotated=st.booleans(),
        sparse=sparse_terms,
    ),
    st.integers(1, 34),
    st.integers(1, 50),
    st.sampled_from([1, 2, 4, 7, 17]),
    st.sampled_from(["float16", "bfloat16", "float32"]),
    st.booleans(),
)
def test_any_format_and_shape(
    check: Check, fmt: Format, rows: int, cols: int, batch: int, dtype: str, bias: bool
) -> None:
    known = dtype if batch <= MAX_BATCH else "float16"  # the interpreter's product of bfloat16 tiles is wrong
    check(random_call(fmt.name, rows, cols, batch, known, bias))
