"""Blocks of Q4_0, Q5_0 and Q8_0: 32 weights of a row with one fp16 factor d. The weight is d (code - 2^(bits - 1)).

Q4_0  d, 16 bytes: the code of weight j in the lower half of byte j, that of weight j + 16 in the upper half
Q5_0  d, u32 with the highest bit of the code of weight j as its bit j, 16 bytes as in Q4_0 for the other bits
Q8_0  d, 32 signed bytes: code - 128
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .types import BLOCK

Bytes = NDArray[np.uint8]
HALF = BLOCK // 2


def encode_blocks(type_name: str, codes: NDArray[np.integer], d: NDArray[np.float16]) -> Bytes:
    """Blocks of a matrix: codes [rows, cols] (0 to 2^bits - 1), d [rows, cols / 32] -> uint8 [rows, bytes of a row]."""
    rows = len(codes)
    parts = codes.reshape(rows, -1, BLOCK)
    factors = d.astype("<f2").reshape(rows, -1, 1).view(np.uint8)
    if type_name == "Q8_0":
        signed = (parts.astype(np.int16) - 128).astype(np.int8).view(np.uint8)
        return np.concatenate([factors, signed], axis=2).reshape(rows, -1)
    low = parts.astype(np.uint8) & 15
    payload = low[..., :HALF] | low[..., HALF:] << 4
    if type_name == "Q4_0":
        return np.concatenate([factors, payload], axis=2).reshape(rows, -1)
    high = np.packbits((parts >> 4).astype(np.uint8), axis=2, bitorder="little")
    return np.concatenate([factors, high, payload], axis=2).reshape(rows, -1)


def decode_blocks(type_name: str, raw: Bytes, rows: int, cols: int) -> NDArray[np.float32]:
    """Weights float32 [rows, cols] of `raw`, the bytes of a matrix, by the rule of the engine."""
    blocks = raw.reshape(rows, cols // BLOCK, -1)
    d = np.ascontiguousarray(blocks[..., :2]).view("<f2").astype(np.float32)
    weights: NDArray[np.float32] = d * _integers(type_name, blocks)
    return weights.reshape(rows, cols)


def _integers(type_name: str, blocks: Bytes) -> NDArray[np.float32]:
    """What d is multiplied by, float32 [rows, blocks, 32]."""
    if type_name == "Q8_0":
        return np.ascontiguousarray(blocks[..., 2:]).view(np.int8).astype(np.float32)
    packed = blocks[..., -HALF:]
    codes = np.concatenate([packed & 15, packed >> 4], axis=2)
    if type_name == "Q4_0":
        return codes.astype(np.float32) - np.float32(8)
    high = np.unpackbits(np.ascontiguousarray(blocks[..., 2:6]), axis=2, bitorder="little")
    integers: NDArray[np.float32] = (codes | high << 4).astype(np.float32) - np.float32(16)
    return integers
