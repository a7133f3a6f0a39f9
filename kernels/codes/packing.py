"""Planar bit packing: the bytes of codes, the same on every machine.

A code of b bits is cut into planes whose widths are powers of two (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 12 = 8 + 4), the
widest plane holding the lowest bits. A plane of width w holds code i in bits [(i mod 32/w) w, ... + w) of the
little-endian 32-bit word i div (32/w): no code straddles a word. The planes follow each other, each ceil(n w / 32)
words; the whole is padded with zero bytes to ALIGN_BYTES.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ALIGN_BYTES = 64
WORD_BITS = 32
MAX_CODE_BITS = 16


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to a multiple of ALIGN_BYTES."""
    return -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES


def plane_widths(bits: int) -> tuple[int, ...]:
    """Widths of the planes of a `bits`-bit code, widest (lowest bits) first."""
    if not 1 <= bits <= MAX_CODE_BITS:
        raise ValueError(f"bits must be 1 to {MAX_CODE_BITS}, not {bits}")
    return tuple(w for w in (16, 8, 4, 2, 1) if bits & w)


def plane_words(count: int, width: int) -> int:
    """32-bit words of one plane of `count` codes."""
    return -(-count * width // WORD_BITS)


def packed_nbytes(count: int, bits: int) -> int:
    """Bytes of `count` packed codes, padding included."""
    return aligned(4 * sum(plane_words(count, w) for w in plane_widths(bits)))


def pad(payload: bytes | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The bytes of `payload`, zero-padded to ALIGN_BYTES, as a new uint8 array."""
    raw = np.frombuffer(payload, dtype=np.uint8) if isinstance(payload, bytes) else payload
    result = np.zeros(aligned(raw.size), dtype=np.uint8)
    result[: raw.size] = raw
    return result


def pack_codes(codes: NDArray[np.integer], bits: int) -> NDArray[np.uint8]:
    """Pack codes (any shape, C order) of `bits` bits: uint8 [packed_nbytes(codes.size, bits)].

    Raises ValueError when a code does not fit.
    """
    flat = np.ascontiguousarray(codes).reshape(-1)
    if flat.size and (int(flat.min()) < 0 or int(flat.max()) >= 1 << bits):
        raise ValueError(f"a code lies outside 0 to {(1 << bits) - 1}")
    planes, shift = [], 0
    for width in plane_widths(bits):
        per_word = WORD_BITS // width
        part = np.zeros(plane_words(flat.size, width) * per_word, dtype=np.uint32)
        part[: flat.size] = (flat.astype(np.uint32) >> np.uint32(shift)) & np.uint32((1 << width) - 1)
        lanes = np.arange(per_word, dtype=np.uint32) * np.uint32(width)
        planes.append(np.bitwise_or.reduce(part.reshape(-1, per_word) << lanes, axis=1).astype("<u4"))
        shift += width
    return pad(np.concatenate(planes).view(np.uint8) if planes else np.empty(0, np.uint8))


def unpack_codes(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint16]:
    """Inverse of `pack_codes`: the first `count` codes, uint16 [count].

    Raises ValueError when the buffer has the wrong size or its padding is not zero.
    """
    if packed.dtype != np.uint8 or packed.shape != (packed_nbytes(count, bits),):
        raise ValueError(f"{count} codes of {bits} bits take {packed_nbytes(count, bits)} bytes, not {packed.shape}")
    words = np.ascontiguousarray(packed).view("<u4")
    result, start, shift = np.zeros(count, dtype=np.uint16), 0, 0
    for width in plane_widths(bits):
        per_word = WORD_BITS // width
        size = plane_words(count, width)
        lanes = np.arange(per_word, dtype=np.uint32) * np.uint32(width)
        part = (words[start : start + size, None] >> lanes) & np.uint32((1 << width) - 1)
        flat = part.reshape(-1)
        if flat[count:].any():
            raise ValueError("padding of packed codes is not zero")
        result |= (flat[:count] << np.uint32(shift)).astype(np.uint16)
        start, shift = start + size, shift + width
    if words[start:].any():
        raise ValueError("padding of packed codes is not zero")
    return result
