"""Which formats the engines of compressed-tensors hold, and what they call them."""

from __future__ import annotations

from reallm.kernels.formats.formats import Format
from reallm.targets.plain_integers import plain_integers

GROUPS = (0, 32, 64, 128)
SGLANG_BITS = (4, 8)


def compressed_tensors_type(fmt: Format, rows: int, cols: int, engine: str = "vllm") -> str | None:
    """The name of a matrix [rows, cols] in `fmt`, such as "W4A16 g64"; None if `engine` does not hold it."""
    codec = plain_integers(fmt, cols)
    if codec is None or codec.group_size not in GROUPS or (engine == "sglang" and codec.bits not in SGLANG_BITS):
        return None
    group = f"g{codec.group_size}" if codec.group_size else "channel"
    return f"W{codec.bits}A16 {group}{' asymmetric' if codec.table == 'uint' else ''}"
