"""The table of element types agrees with numpy and with the safetensors package."""

from __future__ import annotations

import numpy as np
import pytest

from reallm.kernels.storage.dtypes import DTYPES, SAFETENSORS_DTYPES


def test_sizes_are_those_of_numpy() -> None:
    named = {dtype.name: dtype for dtype in DTYPES.values() if dtype.numpy}
    assert {"u8", "i8", "u32", "f16", "f32"} <= named.keys()
    assert all(np.dtype(dtype.numpy).itemsize == dtype.nbytes() for dtype in named.values())


def test_both_tables_have_the_same_rows() -> None:
    assert {dtype.safetensors for dtype in DTYPES.values()} == SAFETENSORS_DTYPES.keys()
    assert len(DTYPES) == len(SAFETENSORS_DTYPES)


def test_four_bit_numbers_fill_whole_bytes_in_pairs() -> None:
    assert DTYPES["f4"].nbytes(6) == 3
    with pytest.raises(ValueError, match="do not fill whole bytes"):
        DTYPES["f4"].nbytes(3)
