"""The reference decode against decodes by hand, and the fields it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from strategies import formats, random_packed, seeds, shapes

from reallm.kernels.codes.packing import pack_codes, pad
from reallm.kernels.codes.tables import table
from reallm.kernels.formats.formats import Format
from reallm.kernels.reference import decode_reference


def f16(*values: float) -> np.ndarray:
    return pad(np.array(values, "<f2").tobytes())


def test_dense_floats_are_themselves() -> None:
    values = np.array([[1.5, -2.0, 3.0]])
    assert np.array_equal(decode_reference(Format.parse("fp16"), {"values": f16(1.5, -2, 3)}, 1, 3), values)
    assert np.array_equal(
        decode_reference(Format.parse("fp32"), {"values": pad(values.astype("<f4").tobytes())}, 1, 3), values
    )
    bf16 = pad(np.array([0x3FC0, 0xC000, 0x4040], "<u2").tobytes())
    assert np.array_equal(decode_reference(Format.parse("bf16"), {"values": bf16}, 1, 3), values)


def test_symmetric_integers_with_a_short_last_group() -> None:
    # int3: level q is (q - 4) / 4. Row of 9 in groups of 8: the ninth weight has the second scale.
    packed = {"codes": pack_codes(np.arange(9) % 8, 3), "scales": f16(4.0, 8.0)}
    expected = [[-4, -3, -2, -1, 0, 1, 2, 3, -8]]
    assert decode_reference(Format.parse("int3-g8"), packed, 1, 9).tolist() == expected


def test_asymmetric_integers_subtract_the_zero_point() -> None:
    packed = {
        "codes": pack_codes(np.array([0, 1, 2, 3]), 2),
        "scales": f16(0.5, 2.0),
        "zeros": pack_codes(np.array([1, 3]), 2),
    }
    assert decode_reference(Format.parse("uint2-g0"), packed, 2, 2).tolist() == [[-0.5, 0.0], [-2.0, 0.0]]


def test_normal_float_codes_are_levels_of_the_table() -> None:
    packed = {"codes": pack_codes(np.arange(16), 4), "scales": f16(2.0)}
    decoded = decode_reference(Format.parse("nf4-g0"), packed, 1, 16)
    assert np.array_equal(decoded[0], 2.0 * table("nf", 4).astype(np.float64))
    # The table in appendix E of QLoRA, printed there as float32.
    assert decoded[0, [0, 7, 8, 15]] / 2 == pytest.approx([-1.0, 0.0, 0.07958029955625534, 1.0], abs=1e-6)


def test_double_quantised_scales_are_min_plus_code_times_step() -> None:
    # 10 rows of one group; blocks of 8 scales; 4-bit scale codes, so a step is range / 15.
    scale_codes = np.array([0, 15, 5, 0, 0, 0, 0, 0, 15, 3])
    packed = {
        "codes": pack_codes(np.zeros(10, int), 2),
        "scale_codes": pack_codes(scale_codes, 4),
        "scale_ranges": f16(30.0, 15.0),
        "scale_min": pad(np.array([1.0], "<f4").tobytes()),
    }
    decoded = decode_reference(Format.parse("int2-g8-dq4x8"), packed, 10, 1)
    # Code 0 of int2 is level -1.
    expected = -np.array([1, 31, 11, 1, 1, 1, 1, 1, 16, 4], float)
    assert decoded[:, 0] == pytest.approx(expected, rel=4 * np.finfo(float).eps)  # a division, a product, a sum


def test_additive_codes_sum_words_of_their_books() -> None:
    books = np.zeros((2, 4, 2))
    books[0] = [[0, 0], [1, 2], [3, 4], [5, 6]]
    books[1] = [[0, 0], [10, 20], [30, 40], [50, 60]]
    codes = np.array([[[1, 2], [3, 0]], [[0, 1], [2, 3]]])  # row, group, codebook
    packed = {"codes": pack_codes(codes, 2), "scales": f16(1.0, 0.5), "codebooks": f16(*books.reshape(-1))}
    expected = [[31, 42, 5], [5, 10, 26.5]]  # three columns: the second group is cut
    for name in ("aq2x2-d2", "aq2x2-d2-shared"):
        assert decode_reference(Format.parse(name), packed, 2, 3).tolist() == expected


def test_int8_factors_carry_a_scale_per_component() -> None:
    zero = {"codes": pack_codes(np.full(4, 2), 2), "scales": f16(1.0, 1.0)}  # code 2 of int2 is level 0
    left, right = np.array([[1, -2], [3, 4]]), np.array([[5, 6], [-7, 8]])
    factors = {
        "left": pad(left.astype("i1").tobytes()),
        "right": pad(right.astype("i1").tobytes()),
        "left_scales": f16(2.0, 0.5),
        "right_scales": f16(1.0, 4.0),
    }
    expected = (left * [2.0, 0.5]) @ (right * [[1.0], [4.0]])
    assert np.array_equal(decode_reference(Format.parse("int2-g0+r2i8"), zero | factors, 2, 2), expected)
    plain = {"left": f16(*left.reshape(-1)), "right": f16(*right.reshape(-1))}
    assert np.array_equal(decode_reference(Format.parse("int2-g0+r2"), zero | plain, 2, 2), left @ right)


@given(formats.filter(lambda f: f.low_rank is None or f.low_rank.rank <= 16), shapes, seeds)
def test_every_format_decodes_every_shape(fmt: Format, shape: tuple[int, int], seed: int) -> None:
    packed = random_packed(fmt, *shape, seed)
    decoded = decode_reference(fmt, packed, *shape)
    assert decoded.shape == shape
    assert np.isfinite(decoded).all()


@pytest.mark.parametrize("name", ["int3-g8", "uint4-g8-dq8x8", "aq2x3-d4", "nf2-g0+r2i8", "e8p3+r2i4", "bf16"])
def test_missing_short_and_dirty_fields_are_refused(name: str) -> None:
    fmt = Format.parse(name)
    packed = random_packed(fmt, 3, 11, seed=0)
    for field in fmt.fields(3, 11):
        missing = {key: value for key, value in packed.items() if key != field.name}
        with pytest.raises(ValueError, match="missing"):
            decode_reference(fmt, missing, 3, 11)
        for wrong in (packed[field.name][:-1], np.append(packed[field.name], np.uint8(0))):
            with pytest.raises(ValueError, match="bytes"):
                decode_reference(fmt, {**packed, field.name: wrong}, 3, 11)
        dirty = packed[field.name].copy()
        if dirty[-1] == 0:
            dirty[-1] = 1
            with pytest.raises(ValueError, match="padding"):
                decode_reference(fmt, {**packed, field.name: dirty}, 3, 11)
