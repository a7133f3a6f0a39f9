"""Arithmetic that the schemes share: scales of blocks, 4-bit floats, and integers packed into words."""

from __future__ import annotations

import torch
from torch import Tensor

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of 4-bit floats (OCP Microscaling Formats 1.0, section 5.3.3), by code."""


def powers_of_two(exponents: Tensor) -> Tensor:
    """The float32 scales of biased 8-bit exponents (E8M0), given as uint8: 2 ** (e - 127). 255 gives infinity.

    They are the exponent bits of a float32, except 2 ** -127, which is a subnormal number.
    """
    bits = exponents.to(torch.int32)
    return torch.where(bits == 0, 1 << 22, bits << 23).view(torch.float32)


def scale_values(scale: Tensor) -> Tensor:
    """Stored scales as float32; uint8 and float8_e8m0fnu hold exponents."""
    exponents = scale.view(torch.uint8) if scale.dtype == torch.float8_e8m0fnu else scale
    return powers_of_two(exponents) if exponents.dtype == torch.uint8 else scale.float()


def unpack_e2m1(packed: Tensor) -> Tensor:
    """4-bit floats, two a byte with the first in the low half: [..., n] of 8 bits -> float32 [..., 2 n]."""
    codes = packed.view(torch.uint8)
    values = torch.tensor(E2M1_VALUES, dtype=torch.float32)
    return values[torch.stack((codes & 15, codes >> 4), dim=-1).long()].flatten(-2)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Unsigned integers of `bits` bits, the first in the lowest bits: int32 [..., n] -> int32 [..., n * (32 / bits)].

    `bits` divides 32.
    """
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)


def expand_blocks(scale: Tensor, rows: int, cols: int, block: tuple[int, int]) -> Tensor:
    """One scale for each element: [..., ceil(rows / block rows), ceil(cols / block cols)] -> [..., rows, cols].

    The last blocks may be smaller than `block`. Raises ValueError if `scale` has another shape.
    """
    expected = (-(-rows // block[0]), -(-cols // block[1]))
    if tuple(scale.shape[-2:]) != expected:
        raise ValueError(
            f"the scales are {list(scale.shape)}, expected {list(expected)} for blocks of {list(block)} "
            f"in a weight [{rows}, {cols}]"
        )
    return scale.repeat_interleave(block[0], dim=-2)[..., :rows, :].repeat_interleave(block[1], dim=-1)[..., :cols]
