"""Which formats llama.cpp holds, and under which names."""

from __future__ import annotations

from reallm.kernels.formats.formats import Format
from reallm.targets.plain_integers import plain_integers

GROUP = 32
NAMES = {4: "Q4_0", 5: "Q5_0", 8: "Q8_0"}
"""Bits of symmetric integers in groups of GROUP -> GGUF type."""


def gguf_type(fmt: Format, rows: int, cols: int) -> str | None:
    """The GGUF type that stores a matrix [rows, cols] in `fmt` exactly; None if there is none."""
    codec = plain_integers(fmt, cols)
    if codec is None or codec.table != "int" or codec.group_size != GROUP:
        return None
    return NAMES.get(codec.bits)
