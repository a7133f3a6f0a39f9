"""The stored bytes of the neural decoder, and its reference decode against decodes by hand."""

from __future__ import annotations

import numpy as np
import pytest
from consistent import random_decoder
from hypothesis import given
from hypothesis import strategies as st
from strategies import neural_codecs, seeds

from reallm.kernels.codes.neural import decode_neural, pack_tensors, unpack_tensors
from reallm.kernels.formats.codecs import NeuralCodec
from reallm.kernels.formats.fields import FormatError
from reallm.kernels.formats.formats import Format


@given(neural_codecs, seeds)
def test_tensors_survive_their_bytes(codec: NeuralCodec, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tensors = [rng.standard_normal(shape) for shape, _ in codec.tensors]
    raw = pack_tensors(codec, tensors)
    once = unpack_tensors(codec, raw)
    assert raw.shape == codec.codebook_shape
    for (_, bits), original, restored in zip(codec.tensors, tensors, once, strict=True):
        # Half a step. There are 8 exponents per octave, so a step is less than 2^(1/8) times the one that just reaches
        # the largest entry.
        step = np.abs(original).max() * 2 ** (1 / 8) / ((1 << (bits - 1)) - 1)
        np.testing.assert_allclose(restored, original, rtol=0, atol=0.5001 * step)
    again = unpack_tensors(codec, pack_tensors(codec, once))
    for first, second in zip(once, again, strict=True):
        assert np.abs(first - second).max() <= np.abs(first).max() / ((1 << 3) - 1)


@given(neural_codecs, st.integers(0, 255))
def test_any_bytes_are_a_finite_decoder(codec: NeuralCodec, byte: int) -> None:
    raw = np.full(codec.codebook_shape, byte, np.uint8)
    codes = np.zeros((2, 3), np.int64)
    assert np.isfinite(decode_neural(codec, raw, codes, np.ones(1), codec.dim + 1)).all()


def test_a_decoder_of_zeros_returns_the_words() -> None:
    codec = NeuralCodec(2, 2, 3, 1, 2, 8)
    words = np.array([[0, 1], [2, 3], [4, 5], [6, 127]], float)
    raw = pack_tensors(codec, [words, *(np.zeros(shape) for shape, _ in codec.tensors[1:])])
    codes = np.array([[1, 0], [3, 2]])  # two patches down, two columns
    expected = [[2, 0], [3, 1], [6, 4]]  # three rows: the last patch is incomplete
    assert decode_neural(codec, raw, codes, np.array([0.5]), 3).tolist() == (np.array(expected) * 0.5).tolist()


def test_a_patch_depends_only_on_the_last_codes_of_its_column() -> None:
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
    step = unpack_tensors(codec, raw)[1][0, 1]  # 1, rounded to a representable step
    decoded = decode_neural(codec, raw, np.array([[1], [0], [1]]), np.ones(1), 3)[:, 0]
    third = unpack_tensors(codec, raw)[3][0, 0]
    assert decoded == pytest.approx([127, third * np.sin(127 * step), 127], rel=1e-15)


def test_sizes_count_codes_and_scales_only() -> None:
    fmt = Format.parse("nd1x4-d2-c32x1-t3-w8")
    codes, scales = fmt.fields(577, 576)
    assert (codes.count, scales.count) == (289 * 576, 36)
    assert fmt.nbytes(576, 576) == 576 * 576 // 4 + 128  # 36 fp16 scales are 72 bytes, padded to 128
    words, first, last = 1 + 16 * 2, 1 + 32 * 6 + 1 + 32, 1 + 2 * 32 + 1 + 2
    assert fmt.shared_field is not None and fmt.shared_field.count == words + first + last
    narrow = Format.parse("nd1x4-d2-c32x1-t3-w4").shared_field
    assert narrow is not None and narrow.count == words + first + last - (32 * 6 + 2 * 32) // 2


def test_rotated_formats_share_a_different_decoder() -> None:
    plain, rotated = Format.parse("nd1x4-d2-c8x1-t2-w8+r4"), Format.parse("nd1x4-d2-c8x1-t2-w8+ldl+rot")
    assert plain.shared_name == "nd1x4-d2-c8x1-t2-w8" and rotated.shared_name == "nd1x4-d2-c8x1-t2-w8+rot"
    assert Format.parse("aq1x4-d4-shared+rot").shared_name == "aq1x4-d4-shared"


@pytest.mark.parametrize("name", ["nd1x4-d2-c8x1-t5-w8", "nd1x9-d2-c8x1-t1-w8", "nd1x4-d3-c8x1-t1-w8"])
def test_impossible_decoders_are_refused(name: str) -> None:
    with pytest.raises(FormatError, match="neural"):
        Format.parse(name)
