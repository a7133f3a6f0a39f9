"""Alignment: every stored field and every file header takes a whole number of ALIGN_BYTES bytes."""

from __future__ import annotations

ALIGN_BYTES = 64


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to a multiple of ALIGN_BYTES."""
    return -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES
