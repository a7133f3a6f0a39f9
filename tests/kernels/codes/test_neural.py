"""The neural decoder's bytes, and its reference decode against decodes by hand."""

from __future__ import annotations

import numpy as np
import pytest
from consistent import random_decoder
from hypothesis import given
from hypothesis import strategies as st
from strategies import neural_codecs, seeds

from reallm.kernels.codes.neural import decode_neural, pack_tensors, unpack_tensors
from reallm.kernels.formats.codecs import FormatError, NeuralCodec
from reallm.kernels.formats.formats import Format


@given(neural_codecs, seeds)
def test_tensors_survive_their_bytes(codec: NeuralCodec, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tensors = [rng.standard_normal(shape) for shape, _ in codec.tensors]
    raw = pack_tensors(codec, tensors)
    once = unpack_tensors(codec, raw)
    assert raw.shape == codec.codebook_shape
    for (_, bits), wanted, found in zip(codec.tensors, tensors, once, strict=True):
        # half a step, and a step reaches the largest entry with less than the next of 8 exponents an octave to spare
        step = np.abs(wanted).max() * 2 ** (1 / 8) / ((1 << (bits - 1)) - 1)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=0.5001 * step)
    again = unpack_tensors(codec, pack_tensors(codec, once))
    for first, second in zip(once, again, strict=True):
        assert np.abs(first - second).max() <= np.abs(first).max() / ((1 << 3) - 1)


@given(neural_codecs, st.integers(0, 255))
def test_any_bytes_are_a_finite_decoder(codec: NeuralCodec, byte: int) -> None:
    raw = np.full(codec.codebook_shape, byte, np.uint8)
    codes = np.zeros((2, 3), np.int64)
    assert np.isfinite(decode_neural(codec, raw, codes, np.ones(1), codec.dim + 1)).all()


def test_a_silent_decoder_leaves_the_words() -> None:
    codec = NeuralCodec(2, 2, 3, 1, 2, 8)
    words = np.array([[0, 1], [2, 3], [4, 5], [6, 127]], float)
    raw = pack_tensors(codec, [words, *(np.zeros(shape) for shape, _ in codec.tensors[1:])])
    codes = np.array([[1, 0], [3, 2]])  # two patches down, two columns
    expected = [[2, 0], [3, 1], [6, 4]]  # three rows: the last patch is cut
    assert decode_neural(codec, raw, codes, np.array([0.5]), 3).tolist() == (np.array(expected) * 0.5).tolist()


def test_a_patch_hears_the_last_codes_of_its_column_alone() -> None:
    codec = NeuralCodec(4, 2, 6, 2, 3, 8)
    rng = np.random.default_rng(0)
    raw, codes = random_decoder(codec, rng), rng.integers(0, 16, (9, 4))
    before = decode_neural(codec, raw, codes, np.ones(1), 18)
    codes[4, 1] ^= 5
    changed = before != decode_neural(codec, raw, codes, np.ones(1), 18)
    assert changed[8:14, 1].all()  # patches 4, 5 and 6
    changed[8:14, 1] = False
    assert not changed.any()


def test_one_channel_by_hand() -> None:
    codec = NeuralCodec(1, 1, 1, 1, 2, 8)
    tensors = [[[0.0], [127.0]], [[0.0, 1.0]], [0.0], [[1.0]], [0.0]]  # D(E) = sin(the patch above)
    raw = pack_tensors(codec, [np.array(t) for t in tensors])
    step = unpack_tensors(codec, raw)[1][0, 1]  # 1 to within a step's exponent
    found = decode_neural(codec, raw, np.array([[1], [0], [1]]), np.ones(1), 3)[:, 0]
    third = unpack_tensors(codec, raw)[3][0, 0]
    assert found == pytest.approx([127, third * np.sin(127 * step), 127], rel=1e-15)


def test_sizes_count_codes_scales_and_nothing_else() -> None:
    fmt = Format.parse("nd1x4-d2-c32x1-t3-w8")
    codes, scales = fmt.fields(577, 576)
    assert (codes.count, scales.count) == (289 * 576, 36)
    assert fmt.nbytes(576, 576) == 576 * 576 // 4 + 128  # 36 fp16 scales fill 72 bytes of two alignments
    words, first, last = 1 + 16 * 2, 1 + 32 * 6 + 1 + 32, 1 + 2 * 32 + 1 + 2
    assert fmt.shared_field is not None and fmt.shared_field.count == words + first + last
    narrow = Format.parse("nd1x4-d2-c32x1-t3-w4").shared_field
    assert narrow is not None and narrow.count == words + first + last - (32 * 6 + 2 * 32) // 2


def test_rotated_formats_share_another_decoder() -> None:
    plain, rotated = Format.parse("nd1x4-d2-c8x1-t2-w8+r4"), Format.parse("nd1x4-d2-c8x1-t2-w8+ldl+rot")
    assert plain.shared_name == "nd1x4-d2-c8x1-t2-w8" and rotated.shared_name == "nd1x4-d2-c8x1-t2-w8+rot"
    assert Format.parse("aq1x4-d4-shared+rot").shared_name == "aq1x4-d4-shared"


@pytest.mark.parametrize("name", ["nd1x4-d2-c8x1-t5-w8", "nd1x9-d2-c8x1-t1-w8", "nd1x4-d3-c8x1-t1-w8"])
def test_decoders_that_cannot_be_are_refused(name: str) -> None:
    with pytest.raises(FormatError, match="neural"):
        Format.parse(name)
