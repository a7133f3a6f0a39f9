"""Element types of stored tensors: one table of their names, sizes and numpy equivalents.

A type has two names: the one safetensors files use ("BF16") and the short one that fields, plans and tables use
("bf16"), which is the same in lower case. The torch equivalents are in `reallm.system.torch_dtypes`, because this
package must load without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

FloatName = Literal["f16", "bf16", "f32"]
"""The types that weights and activations may have."""


@dataclass(frozen=True, slots=True)
class Dtype:
    """One element type."""

    safetensors: str
    bits: int
    numpy: str | None = None
    """numpy's name of the type, little endian; None where numpy lacks it or reallm never reads such values."""

    @property
    def name(self) -> str:
        """The short name."""
        return self.safetensors.lower()

    def nbytes(self, count: int = 1) -> int:
        """Bytes of `count` elements. Raises ValueError when these do not fill whole bytes."""
        if count * self.bits % 8:
            raise ValueError(f"{count} elements of {self.bits} bits do not fill whole bytes")
        return count * self.bits // 8


_TABLE = (
    Dtype("BOOL", 8),
    Dtype("U8", 8, "u1"),
    Dtype("I8", 8, "i1"),
    Dtype("F8_E4M3", 8),
    Dtype("F8_E5M2", 8),
    Dtype("F8_E8M0", 8),
    Dtype("U16", 16, "<u2"),
    Dtype("I16", 16, "<i2"),
    Dtype("F16", 16, "<f2"),
    Dtype("BF16", 16),
    Dtype("U32", 32, "<u4"),
    Dtype("I32", 32, "<i4"),
    Dtype("F32", 32, "<f4"),
    Dtype("U64", 64, "<u8"),
    Dtype("I64", 64, "<i8"),
    Dtype("F64", 64, "<f8"),
    Dtype("C64", 64),
    Dtype("F4", 4),
)
DTYPES: Mapping[str, Dtype] = {dtype.name: dtype for dtype in _TABLE}
"""Short name -> element type."""
SAFETENSORS_DTYPES: Mapping[str, Dtype] = {dtype.safetensors: dtype for dtype in _TABLE}
"""Name in safetensors files (https://github.com/huggingface/safetensors#format) -> element type."""
SAFETENSORS_FLOATS = tuple(DTYPES[name].safetensors for name in get_args(FloatName))
"""The names in safetensors files of the types that weights may have."""
