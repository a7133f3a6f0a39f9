"""Packing: round trips for every width, and bytes that never change."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import seeds, shapes

from reallm.kernels.codes.packing import pack_codes, pad, unpack_codes
from reallm.kernels.formats.bit_planes import packed_nbytes
from reallm.kernels.storage.alignment import ALIGN_BYTES, aligned

widths = st.integers(1, 16)


@given(shapes, widths, seeds)
@example((1, 1), 16, 0)
@example((1, 33), 3, 1)
def test_unpack_inverts_pack(shape: tuple[int, int], bits: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, shape)
    packed = pack_codes(codes, bits)
    assert packed.nbytes == packed_nbytes(codes.size, bits)
    assert packed.nbytes % ALIGN_BYTES == 0
    assert np.array_equal(unpack_codes(packed, bits, codes.size), codes.reshape(-1))


def test_three_bit_codes_by_hand() -> None:
    # Codes 0..7: the low two bits are 0,1,2,3,0,1,2,3 -> 0b11_10_01_00 twice; the high bits are four 0s, four 1s.
    packed = pack_codes(np.arange(8), 3)
    assert packed[:8].tolist() == [0b11100100, 0b11100100, 0, 0, 0b11110000, 0, 0, 0]
    assert not packed[8:].any()


GOLDEN = {
    1: "490e63f4ab7d21ba",
    2: "c03fcf3eb9399a5f",
    3: "5d3046908596abef",
    4: "fb2b5a9f5783deb7",
    5: "5588d73c43868247",
    6: "d3e574d738d5741d",
    8: "1d6794272fa988f6",
    12: "f542f3e321c34483",
    16: "876c3a9b50a2f114",
}


@pytest.mark.parametrize("bits", GOLDEN)
def test_packed_bytes_never_change(bits: int) -> None:
    codes = (np.arange(1001, dtype=np.uint64) * 2654435761 >> 7) % (1 << bits)
    assert hashlib.sha256(pack_codes(codes, bits).tobytes()).hexdigest()[:16] == GOLDEN[bits]


@given(widths, st.integers(1, 200), seeds, st.data())
def test_a_flipped_bit_changes_a_code_or_is_refused(bits: int, count: int, seed: int, data: st.DataObject) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, count)
    packed = pack_codes(codes, bits)
    position = data.draw(st.integers(0, 8 * packed.size - 1))
    packed[position // 8] ^= np.uint8(1 << position % 8)
    try:
        changed = unpack_codes(packed, bits, count)
    except ValueError as error:
        assert "padding" in str(error)
    else:
        assert int((changed != codes).sum()) == 1


@pytest.mark.parametrize("codes", [[8], [-1], [0, 7, 9]])
def test_codes_that_do_not_fit_are_refused(codes: list[int]) -> None:
    with pytest.raises(ValueError, match="outside 0 to 7"):
        pack_codes(np.array(codes), 3)


def test_buffers_of_the_wrong_size_or_type_are_refused() -> None:
    packed = pack_codes(np.arange(8), 3)
    for wrong in (packed[:-1], packed.astype(np.int8), packed.reshape(1, -1)):
        with pytest.raises(ValueError, match="take 64 bytes"):
            unpack_codes(wrong, 3, 8)


@given(st.integers(0, 300), seeds)
def test_pad_keeps_the_bytes_and_adds_zeros(size: int, seed: int) -> None:
    raw = np.random.default_rng(seed).bytes(size)
    for payload in (raw, np.frombuffer(raw, np.uint8)):
        padded = pad(payload)
        assert padded.tobytes() == raw + bytes(aligned(size) - size)
