"""Which formats MLX holds, and what it calls them."""

from __future__ import annotations

from reallm.kernels.formats.formats import Format
from reallm.targets.plain_integers import plain_integers

GROUPS = (32, 64, 128)


def mlx_type(fmt: Format, rows: int, cols: int) -> str | None:
    """The name of a matrix [rows, cols] in `fmt`, such as "affine 4 bits g64"; None if MLX does not hold it."""
    codec = plain_integers(fmt, cols)
    if codec is None or codec.table != "int" or codec.group_size not in GROUPS:
        return None
    return f"affine {codec.bits} bits g{codec.group_size}"
