"""The generated kernels on a GPU, if there is one: the products that other tests check in the interpreter."""

from __future__ import annotations

import pytest
import torch
from interpreted import assert_matches, random_call, run_on

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TRELLISES = [
    *("tq1-l12", "tq1.5-l16", "tq2.25-l8", "tq3-l10", "tq4.5-l12", "tq6-l16+rot", "tq2.25-l12+rot", "tq3-l12+r8i4+o5"),
    "tq2-l12+ldl2+rot",
]
SCALARS = [
    *("int2-g32", "uint3-g0", "int4-g64", "uint5-g24+r8i8", "nf3-g64-dq8x256+r16", "nf4-g64", "lm2-g64", "lm6-g64"),
    *("uint8-g0", "int4-g32+o10+r3i8", "lm4-g32+perm+cs+rot", "uint2-g16+perm+rot+r8i8", "lm3-g64-dq6x64"),
]
WORDS = [
    *("aq1x8-d8", "aq2x8-d8", "aq2x8-d8+r70", "aq3x12-d4-shared", "aq2x10-d8", "e8p2", "e8p3+rot", "e8p4+rot+o20+r3i4"),
    *("km2", "km3+o5", "km4+perm"),
]
"""Each codec with terms that may follow it; the tests in the interpreter check each of these separately."""
SHAPES = [(576, 1536, 1), (192, 576, 3), (33, 77, 2), (128, 256, 16), (150, 96, 70), (40, 77, 5), (1000, 4096, 33)]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", [*TRELLISES, *SCALARS, *WORDS])
def test_every_codec(name: str, dtype: str) -> None:
    for rows, cols, batch in SHAPES:
        call = random_call(name, rows, cols, batch, dtype, bias=batch % 2 == 0)
        assert_matches(call, *run_on(call, "cuda"))


@pytest.mark.parametrize("name", ["tq3-l12+ldl2+rot", "uint4-g64", "aq2x8-d8", "e8p3+rot"])
def test_a_product_is_the_same_each_time(name: str) -> None:
    call = random_call(name, 576, 1536, 3, "bfloat16")
    first = run_on(call, "cuda")[0]
    for _ in range(20):
        assert (run_on(call, "cuda")[0] == first).all()
