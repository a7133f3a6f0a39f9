"""Fields: the runs of bytes that a compressed matrix is stored in, with their exact sizes.

Every field is a flat run of bytes, zero-padded to ALIGN_BYTES, so that sizes add up exactly, and a framework that
casts tensors of floats leaves fields unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

from reallm.kernels.storage.alignment import aligned
from reallm.kernels.storage.dtypes import DTYPES

from ..errors import ReallmError
from .bit_planes import packed_nbytes


class FormatError(ReallmError, ValueError):
    """A format with invalid parameters, or a name that cannot be parsed as a format."""


@dataclass(frozen=True, slots=True)
class Field:
    """One stored run of bytes: `count` values of `dtype`.

    "u1" to "u16" are codes of that many bits, packed in planes (`bit_planes`); "u32" are plain 32-bit words; "f16",
    "bf16", "f32" and "i8" are plain numbers.
    """

    name: str
    dtype: str
    count: int

    @property
    def code_bits(self) -> int:
        """Bits of one packed code; 0 when the values are stored as plain numbers."""
        return int(self.dtype[1:]) if self.dtype[0] == "u" and self.dtype != "u32" else 0

    @property
    def nbytes(self) -> int:
        """Bytes in the file, padding included."""
        if self.code_bits:
            return packed_nbytes(self.count, self.code_bits)
        return aligned(DTYPES[self.dtype].nbytes(self.count))
