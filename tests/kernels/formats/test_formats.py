"""Formats: names round-trip, sizes equal those of the stored bytes, and impossible formats are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import formats, random_packed, seeds, shapes

from reallm.kernels.formats.fields import FormatError
from reallm.kernels.formats.formats import Format
from reallm.kernels.storage.alignment import ALIGN_BYTES


@given(formats)
def test_a_name_reads_back_as_the_same_format(fmt: Format) -> None:
    assert Format.parse(fmt.name) == fmt
    assert Format.parse(f"  {fmt.name.upper()} ") == fmt


@given(st.one_of(st.text(max_size=20), st.from_regex(r"(u?int|nf|lm|aq)[0-9x]{0,4}-[gd][0-9]{0,6}(\\+[a-z0-9]*)?")))
def test_text_is_a_format_or_a_format_error(text: str) -> None:
    try:
        fmt = Format.parse(text)
    except FormatError as error:
        assert "\n" not in str(error)
    else:
        assert Format.parse(fmt.name) == fmt


@pytest.mark.parametrize(
    "name",
    [
        "",
        "int4",
        "int7-g64",
        "int4-g7",
        "int4-g65537",
        "nf4-g64-dq5x256",
        "nf4-g64-dq8x7",
        "aq0x8-d8",
        "aq5x8-d8",
        "aq2x13-d8",
        "aq2x8-d3",
        "bf16+r4",
        "bf16+ldl",
        "int4-g64+r0",
        "int4-g64+r1025",
        "int4-g64+ldl+ldl",
        "int4-g64+r4+r8",
        "int4-g64+gptq",
        "int4-g64+ldl+ldl2",
        "aq2x8-d8+lwc",
        "nf4-g64+svd",
        "nf4-g64+ldl+svd+r8",
        "bf16+rot",
        "int4-g64+o0",
        "int4-g64+o201",
        "km5",
        "tq2.3-l10",
        "tq0.5-l10",
        "tq2-l7",
        "int4-g64+",
        "q4_0",
    ],
)
def test_formats_that_cannot_exist_are_refused(name: str) -> None:
    with pytest.raises(FormatError):
        Format.parse(name)


@given(formats.filter(lambda f: f.low_rank is None or f.low_rank.rank <= 64), shapes, seeds)
def test_field_sizes_are_the_sizes_of_the_bytes(fmt: Format, shape: tuple[int, int], seed: int) -> None:
    fields, packed = fmt.fields(*shape), random_packed(fmt, *shape, seed)
    assert [f.nbytes for f in fields] == [packed[f.name].nbytes for f in fields]
    assert fmt.nbytes(*shape) == sum(packed[f.name].nbytes for f in fields)
    assert all(f.nbytes % ALIGN_BYTES == 0 for f in fields)
    assert len({f.name for f in fields}) == len(fields)


def test_sizes_by_hand() -> None:
    # 576 x 576 in 3 bits: 331776 codes -> planes of 82944 and 41472 bytes; 5184 scales of 2 bytes; all multiples of 64.
    assert Format.parse("int3-g64").nbytes(576, 576) == 82944 + 41472 + 10368
    # Asymmetric: also 5184 three-bit zero points, 1296 + 648 bytes -> 1984 with padding.
    assert Format.parse("uint3-g64").nbytes(576, 576) == 82944 + 41472 + 10368 + 1984
    # Double quantisation: 5184 bytes of scale codes, 21 ranges of 2 bytes -> 64, one float -> 64.
    assert Format.parse("nf4-g64-dq8x256").nbytes(576, 576) == 165888 + 5184 + 64 + 64
    # A row of 77 in groups of 64 has two groups: 5 * 77 codes of 4 bits -> 196 -> 256 bytes, 10 scales -> 64.
    assert Format.parse("int4-g64").nbytes(5, 77) == 256 + 64
    # Two codebooks of 256 words of 8: 5 * 10 * 2 one-byte codes -> 128, 5 scales -> 64, 2 * 256 * 8 * 2 bytes.
    assert Format.parse("aq2x8-d8").nbytes(5, 77) == 128 + 64 + 8192
    assert Format.parse("aq2x8-d8-shared").nbytes(5, 77) == 128 + 64
    # Rank 3 int8 factors of 5 x 77: 15 -> 64, 231 -> 256, and two fields of 3 scales -> 64 each.
    assert Format.parse("int4-g64+r3i8").nbytes(5, 77) == 320 + 64 + 256 + 64 + 64
    assert Format.parse("bf16").nbytes(5, 7) == 128


@given(formats, shapes)
def test_feedback_does_not_change_the_fields(fmt: Format, shape: tuple[int, int]) -> None:
    if fmt.feedback:
        assert replace(fmt, feedback="").fields(*shape) == fmt.fields(*shape)
