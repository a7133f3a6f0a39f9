"""The torch decode equals the independent float64 reference for every codec, on odd shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import random_fields

from reallm.decoding.decode import decode, decode_factors
from reallm.decoding.unpack import unpack
from reallm.kernels.codes.hadamard import rotation
from reallm.kernels.codes.packing import pack_codes
from reallm.kernels.formats.codecs import SCALAR_BITS, AdditiveCodec
from reallm.kernels.formats.formats import Format
from reallm.kernels.reference import decode_reference

SCALARS = [
    f"{name}{bits}-g{group}"
    for name in ("int", "uint", "nf", "lm")
    for bits, group in zip(SCALAR_BITS, (0, 8, 16, 24, 64, 576), strict=True)
]
DOUBLE = ["nf4-g8-dq8x8", "int3-g16-dq6x16", "uint5-g8-dq4x256", "lm2-g0-dq8x64"]
ADDITIVE = ["aq1x8-d8", "aq2x8-d8", "aq3x5-d4", "aq4x1-d2", "aq2x12-d8", "aq2x9-d4-shared"]
LOW_RANK = ["nf3-g16+r3", "int4-g8+r5i8", "aq2x4-d4+r1", "aq1x6-d8-shared+ldl+r2i8"]
TABLES = ["km3", "km2+r2i4", "km4+o50"]
LATTICE = ["e8p2", "e8p3+rot", "e8p4+ldl+o9+r2i8", "e8p3+perm+r3i4"]
TRELLIS = ["tq2-l8", "tq1.375-l10+ldl2+rot", "tq3.125-l12+rot", "tq6-l16"]
TRANSFORMED = ["int4-g8+perm", "uint3-g16+cs", "lm3-g8+ldl+perm+cs+rot+o20+r3", "aq1x6-d4-shared+rot+o5+r2i4"]
NEURAL = ["nd1x4-d2-c8x1-t3-w8", "nd1x3-d8-c5x3-t2-w4+perm", "nd1x8-d4-c16x2-t2-w8+ldl+r2", "nd1x2-d1-c3x1-t1-w4"]
NAMES = [
    *SCALARS,
    *DOUBLE,
    *ADDITIVE,
    *LOW_RANK,
    *TABLES,
    *LATTICE,
    *TRELLIS,
    *NEURAL,
    *TRANSFORMED,
    "bf16",
    "fp16",
    "fp32",
]


def both(
    name: str, rows: int, cols: int, seed: int
) -> tuple[Format, dict[str, torch.Tensor], torch.Tensor | None, np.ndarray]:
    fmt = Format.parse(name)
    packed = random_fields(fmt, rows, cols, seed)
    tensors = {key: torch.from_numpy(value) for key, value in packed.items()}
    shared = tensors.pop("codebooks") if fmt.shared_field else None
    return fmt, tensors, shared, decode_reference(fmt, packed, rows, cols)


def tolerance(fmt: Format, fields: dict[str, torch.Tensor], rows: int, cols: int, reference: np.ndarray) -> float:
    """A bound on float32 rounding: at most 8 roundings of 2^-24 per weight, and two more for each of the `rank` terms.

    They apply to the largest entry of |codes| + |L| |R|, and |codes| <= |reference| + |L| |R|. The terms of a sum may
    cancel (three words, or a scale and its minimum), which 3 * 5 * 5 covers for normal values under 5.
    """
    left, right = decode_factors(fmt, fields, rows, cols)
    product = float((left.abs() @ right.abs()).max()) if fmt.low_rank else 0.0
    rank = fmt.low_rank.rank if fmt.low_rank else 0
    bound = (8 + 2 * rank) * 2.0**-24 * (float(np.abs(reference).max()) + 2 * product + 75.0)
    return bound + rotation_bound(fmt, fields, rows, cols) if fmt.rotated else bound


def rotation_bound(fmt: Format, fields: dict[str, torch.Tensor], rows: int, cols: int) -> float:
    """The rounding of sums of at most `rows` + `cols` products with rounded factors, of magnitudes |R| |C| |R|."""
    packed = {name: raw.numpy() for name, raw in fields.items()}
    if fmt.shared_field:
        packed[fmt.shared_field.name] = random_fields(fmt, rows, cols, rows * cols)[fmt.shared_field.name]
    codes = np.abs(decode_reference(Format(fmt.codec), packed, rows, cols))
    largest = (np.abs(rotation(rows)).T @ codes @ np.abs(rotation(cols))).max()
    return 2 * (rows + cols + 8) * 2.0**-24 * float(largest) * 2  # channel scales are at most 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (7, 33), (5, 576)])
def test_decode_equals_the_reference(name: str, rows: int, cols: int) -> None:
    fmt, fields, shared, reference = both(name, rows, cols, seed=rows * cols)
    weight = decode(fmt, fields, rows, cols, shared=shared)
    assert weight.shape == (rows, cols) and weight.dtype == torch.float32
    np.testing.assert_allclose(weight.numpy(), reference, rtol=0, atol=tolerance(fmt, fields, rows, cols, reference))


@pytest.mark.parametrize("name", NAMES)
def test_selected_rows_equal_those_of_the_whole_matrix(name: str) -> None:
    fmt, fields, shared, _ = both(name, 11, 37, seed=5)
    select = torch.tensor([10, 0, 3, 3])
    whole = decode(fmt, fields, 11, 37, shared=shared)
    rows = decode(fmt, fields, 11, 37, shared=shared, select=select)
    # the low-rank product may be summed in another order for another number of rows
    bound = tolerance(fmt, fields, 11, 37, whole.numpy()) if fmt.low_rank else 0
    torch.testing.assert_close(rows, whole[select], rtol=0, atol=bound)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_decode_equals_the_reference_on_any_shape(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(NAMES))
    rows, cols = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 90))
    fmt, fields, shared, reference = both(name, rows, cols, seed=data.draw(st.integers(0, 1000)))
    weight = decode(fmt, fields, rows, cols, shared=shared)
    np.testing.assert_allclose(weight.numpy(), reference, rtol=0, atol=tolerance(fmt, fields, rows, cols, reference))


@given(st.integers(1, 16), st.integers(1, 300), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_unpack_inverts_pack_at_every_width(bits: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << bits, count)
    packed = torch.from_numpy(pack_codes(codes, bits))
    index = torch.from_numpy(rng.integers(0, count, (3, 4)))
    assert np.array_equal(unpack(packed, bits, count).numpy(), codes)
    assert np.array_equal(unpack(packed, bits, count, index).numpy(), codes[index.numpy()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_narrow_dtype_is_the_float32_weight_rounded_once(dtype: torch.dtype) -> None:
    fmt, fields, shared, _ = both("nf4-g8-dq8x8+r3" if dtype == torch.float16 else "aq2x8-d8", 9, 40, seed=1)
    once = decode(fmt, fields, 9, 40, shared=shared).to(dtype)
    assert torch.equal(decode(fmt, fields, 9, 40, shared=shared, dtype=dtype), once)


def test_fields_that_start_off_a_word_are_read() -> None:
    fmt, fields, _, reference = both("int4-g8+r2", 6, 24, seed=3)
    moved = {name: torch.cat([torch.zeros(1, dtype=torch.uint8), raw])[1:] for name, raw in fields.items()}
    bound = tolerance(fmt, fields, 6, 24, reference)
    np.testing.assert_allclose(decode(fmt, moved, 6, 24).numpy(), reference, rtol=0, atol=bound)


def test_low_rank_term_is_the_difference() -> None:
    fmt, fields, _, _ = both("int4-g8+r5i8", 12, 20, seed=2)
    left, right = decode_factors(fmt, fields, 12, 20)
    codes_only = decode(fmt, fields, 12, 20, low_rank=False)
    whole = decode(fmt, fields, 12, 20)
    bound = tolerance(fmt, fields, 12, 20, whole.numpy())
    torch.testing.assert_close(codes_only + left @ right, whole, rtol=0, atol=bound)
    assert decode_factors(Format.parse("int4-g8"), fields, 12, 20)[0].shape == (12, 0)


@pytest.mark.parametrize("damage", ["missing", "short", "dtype"])
def test_wrong_fields_are_refused_by_name(damage: str) -> None:
    fmt, fields, _, _ = both("int4-g8", 4, 16, seed=0)
    if damage == "missing":
        del fields["scales"]
    else:
        fields["scales"] = fields["scales"][:-1] if damage == "short" else fields["scales"].to(torch.int8)
    with pytest.raises(ValueError, match="'scales'"):
        decode(fmt, fields, 4, 16)


def test_shared_codebooks_must_be_given() -> None:
    fmt, fields, _, _ = both("aq1x4-d4-shared", 4, 16, seed=0)
    assert isinstance(fmt.codec, AdditiveCodec)
    with pytest.raises(ValueError, match="shared codebooks"):
        decode(fmt, fields, 4, 16)
