"""Bit planes: their widths and the sizes of packed codes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reallm.kernels.formats.bit_planes import packed_nbytes, plane_widths
from reallm.kernels.storage.alignment import ALIGN_BYTES

widths = st.integers(1, 16)


@given(st.integers(0, 10_000), widths)
def test_packed_size_is_the_information_plus_padding(count: int, bits: int) -> None:
    # Each plane wastes less than one 32-bit word; the padding adds less than one alignment unit.
    waste = packed_nbytes(count, bits) - count * bits / 8
    assert 0 <= waste < 4 * len(plane_widths(bits)) + ALIGN_BYTES


def test_planes_add_up_to_the_code_and_never_straddle_words() -> None:
    for bits in range(1, 17):
        assert sum(plane_widths(bits)) == bits
        assert all(32 % width == 0 for width in plane_widths(bits))


@pytest.mark.parametrize("bits", [0, 17, -1])
def test_widths_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="1 to 16"):
        packed_nbytes(5, bits)
