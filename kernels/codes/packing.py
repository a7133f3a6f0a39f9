"""Packing codes into planes of bits and back; `formats.bit_planes` describes the layout."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from reallm.kernels.formats.bit_planes import WORD_BITS, packed_nbytes, plane_widths, plane_words
from reallm.kernels.storage.alignment import aligned


def pad(payload: bytes | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A new uint8 array of the bytes of `payload`, zero-padded to a multiple of ALIGN_BYTES."""
    raw = np.frombuffer(payload, dtype=np.uint8) if isinstance(payload, bytes) else payload
    result = np.zeros(aligned(raw.size), dtype=np.uint8)
    result[: raw.size] = raw
    return result


def pack_codes(codes: NDArray[np.integer], bits: int) -> NDArray[np.uint8]:
    """Pack codes (any shape, C order) of `bits` bits each: uint8 [packed_nbytes(codes.size, bits)].

    Raises ValueError for a code that does not fit into `bits` bits.
    """
    flat = np.ascontiguousarray(codes).reshape(-1)
    if flat.size and (int(flat.min()) < 0 or int(flat.max()) >= 1 << bits):
        raise ValueError(f"a code is outside 0 to {(1 << bits) - 1}")
    planes, shift = [], 0
    for width in plane_widths(bits):
        per_word = WORD_BITS // width
        part = np.zeros(plane_words(flat.size, width) * per_word, dtype=np.uint32)
        part[: flat.size] = (flat.astype(np.uint32) >> np.uint32(shift)) & np.uint32((1 << width) - 1)
        lanes = np.arange(per_word, dtype=np.uint32) * np.uint32(width)
        planes.append(np.bitwise_or.reduce(part.reshape(-1, per_word) << lanes, axis=1).astype("<u4"))
        shift += width
    return pad(np.concatenate(planes).view(np.uint8) if planes else np.empty(0, np.uint8))


def check_packed(packed: NDArray[np.uint8], bits: int, count: int) -> None:
    """Raise ValueError unless `packed` has the size of `count` codes of `bits` bits and its padding is zero.

    Every code is valid, so this is all that can be wrong with packed codes; it reads the last word of each plane only.
    """
    if packed.dtype != np.uint8 or packed.shape != (packed_nbytes(count, bits),):
        raise ValueError(f"{count} codes of {bits} bits take {packed_nbytes(count, bits)} bytes, not {packed.shape}")
    words, end = np.ascontiguousarray(packed).view("<u4"), 0
    for width in plane_widths(bits):
        end += plane_words(count, width)
        used_bits = count * width % WORD_BITS
        if used_bits and int(words[end - 1]) >> used_bits:
            raise ValueError("padding of packed codes is not zero")
    if words[end:].any():
        raise ValueError("padding of packed codes is not zero")


def unpack_codes(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint16]:
    """The inverse of `pack_codes`: the first `count` codes, uint16 [count].

    Raises ValueError for a buffer of the wrong size and for padding that is not zero.
    """
    check_packed(packed, bits, count)
    words = np.ascontiguousarray(packed).view("<u4")
    result, start, shift = np.zeros(count, dtype=np.uint16), 0, 0
    for width in plane_widths(bits):
        per_word = WORD_BITS // width
        size = plane_words(count, width)
        lanes = np.arange(per_word, dtype=np.uint32) * np.uint32(width)
        part = (words[start : start + size, None] >> lanes) & np.uint32((1 << width) - 1)
        result |= (part.reshape(-1)[:count] << np.uint32(shift)).astype(np.uint16)
        start, shift = start + size, shift + width
    return result
