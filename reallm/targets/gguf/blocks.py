"""The blocks of Q4_0, Q5_0 and Q8_0: 32 weights of a row with one fp16 step d (ggml-common.h).

Q4_0   d, then 16 bytes: byte j holds code j in its low and code j + 16 in its high half; value d (code - 8)
Q5_0   d, then 32 bits: bit i is the highest bit of code i; then as Q4_0; value d (code - 16)
Q8_0   d, then 32 signed bytes; value d code
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from reallm.targets.packed_integers import PackedMatrix

from .types import GROUP

TYPE_IDS = {"Q4_0": 2, "Q5_0": 6, "Q8_0": 8}
_HALF = GROUP // 2


def to_blocks(matrix: PackedMatrix, order: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The blocks of the rows `order` of a matrix, uint8 [rows, bytes of a row]."""
    codes = matrix.codes[order].reshape(len(order), -1, GROUP)
    steps = np.ascontiguousarray(matrix.steps[order].astype("<f2")).view(np.uint8).reshape(*codes.shape[:2], 2)
    if matrix.bits == 8:
        return np.concatenate([steps, codes ^ np.uint8(128)], axis=2).reshape(len(order), -1)
    low = codes & np.uint8(15)
    halves = low[..., :_HALF] | (low[..., _HALF:] << np.uint8(4))
    high = [np.packbits(codes >> np.uint8(4), axis=2, bitorder="little")] if matrix.bits == 5 else []
    return np.concatenate([steps, *high, halves], axis=2).reshape(len(order), -1)


def from_blocks(blocks: NDArray[np.uint8], kind: int, rows: int) -> NDArray[np.float32]:
    """The values of stored blocks, float32 [rows, cols]: the formulas above, for reading a file back."""
    name = {number: name for name, number in TYPE_IDS.items()}[kind]
    size = {"Q4_0": 18, "Q5_0": 22, "Q8_0": 34}[name]
    parts = blocks.reshape(-1, size)
    steps = np.ascontiguousarray(parts[:, :2]).view("<f2").astype(np.float32)
    if name == "Q8_0":
        return (steps * np.ascontiguousarray(parts[:, 2:]).view(np.int8)).reshape(rows, -1)
    halves = parts[:, -_HALF:].astype(np.int32)
    codes = np.concatenate([halves % 16, halves // 16], axis=1) - 8
    if name == "Q5_0":
        word = np.ascontiguousarray(parts[:, 2:6]).view("<u4").astype(np.int64)
        codes = codes - 8 + 16 * ((word >> np.arange(GROUP)) & 1).astype(np.int32)
    return (steps * codes.astype(np.float32)).reshape(rows, -1)
