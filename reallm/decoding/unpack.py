"""Reading packed bytes into torch tensors, on any device: codes from their bit planes, floats and words."""

from __future__ import annotations

import torch
from torch import Tensor

from reallm.kernels.formats.bit_planes import plane_widths, plane_words
from reallm.kernels.storage.dtypes import DTYPES
from reallm.system.torch_dtypes import TORCH_DTYPES


def unpack(packed: Tensor, bits: int, count: int, index: Tensor | None = None) -> Tensor:
    """Unpack codes of `bits` bits from a packed field.

    `packed` (uint8) holds `count` codes. With `index` (int64, any shape) only the codes at those positions are
    returned, in the shape of `index`; without it all of them, as [count]. The result is uint8 up to 8 bits and int32
    above. The bit planes are those of `kernels.codes.packing`: in a plane of width w <= 8, code i is in byte
    floor(i w / 8).
    """
    code_dtype = torch.uint8 if bits <= 8 else torch.int32
    shape = (count,) if index is None else tuple(index.shape)
    codes = torch.zeros(shape, dtype=code_dtype, device=packed.device)
    start = shift = 0
    for width in plane_widths(bits) if count else ():
        nbytes = 4 * plane_words(count, width)
        plane = packed[start : start + nbytes]
        part = _read_plane(plane, width, count) if index is None else _gather_from_plane(plane, width, index)
        codes |= part.to(code_dtype) << shift
        start, shift = start + nbytes, shift + width
    return codes


def _read_plane(plane: Tensor, width: int, count: int) -> Tensor:
    if width >= 8:
        return _wide_plane_codes(plane, width)[:count]
    lanes = torch.arange(0, 8, width, dtype=torch.uint8, device=plane.device)
    return ((plane[:, None] >> lanes) & ((1 << width) - 1)).reshape(-1)[:count]


def _gather_from_plane(plane: Tensor, width: int, index: Tensor) -> Tensor:
    if width >= 8:
        return _wide_plane_codes(plane, width)[index]
    bit = index * width
    return (plane[bit >> 3] >> (bit & 7).to(torch.uint8)) & ((1 << width) - 1)


def _wide_plane_codes(plane: Tensor, width: int) -> Tensor:
    """The codes of a plane of 8 or 16 bits."""
    return plane if width == 8 else plane.view(torch.int16).to(torch.int32) & 0xFFFF


def word_aligned(packed: Tensor) -> Tensor:
    """Return `packed`, or a copy if it does not start at a multiple of four bytes: it can then be viewed as words."""
    return packed.clone() if packed.storage_offset() % 4 else packed


def read_floats(packed: Tensor, dtype: str, count: int) -> Tensor:
    """Read the first `count` values of a field of type "f16", "bf16", "f32" or "i8", as float32 [count]."""
    body = word_aligned(packed[: DTYPES[dtype].nbytes(count)])
    return body.view(TORCH_DTYPES[dtype]).to(torch.float32)


def read_words(packed: Tensor, count: int) -> Tensor:
    """Read the first `count` words of a "u32" field, as int64 [count]."""
    return word_aligned(packed[: 4 * count]).view(torch.int32).to(torch.int64) & 0xFFFFFFFF
