"""Bit planes: how packed codes are laid out, and how many bytes they take. `codes.packing` packs and unpacks them.

A code of b bits is cut into planes whose widths are powers of two (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 12 = 8 + 4), the
widest plane holding the lowest bits. A plane of width w holds code i in bits [(i mod 32/w) w, ... + w) of the
little-endian 32-bit word i div (32/w): no code straddles a word. The planes follow each other, each ceil(n w / 32)
words long; the total is padded with zero bytes to ALIGN_BYTES.
"""

from __future__ import annotations

from reallm.kernels.storage.alignment import aligned

WORD_BITS = 32
MAX_CODE_BITS = 16


def plane_widths(bits: int) -> tuple[int, ...]:
    """Widths of the planes of a `bits`-bit code, widest (lowest bits) first.

    Raises ValueError unless `bits` is 1 to 16.
    """
    if not 1 <= bits <= MAX_CODE_BITS:
        raise ValueError(f"bits must be 1 to {MAX_CODE_BITS}, not {bits}")
    return tuple(w for w in (16, 8, 4, 2, 1) if bits & w)


def plane_words(count: int, width: int) -> int:
    """Number of 32-bit words in one plane of `count` codes."""
    return -(-count * width // WORD_BITS)


def packed_nbytes(count: int, bits: int) -> int:
    """Bytes of `count` packed codes, padding included."""
    return aligned(4 * sum(plane_words(count, w) for w in plane_widths(bits)))
