"""Weights in 8-bit floats with a scale for each block, row or tensor: `fp8` of DeepSeek-V3, `mxfp8` and `fbgemm_fp8`.

The weight is code * scale (although the name of the scales ends in `_inv`). Blocks of the last row and column may be
smaller than the others (DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, section 3.3.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .blocks import expand_blocks, scale_values, unpack_e2m1
from .scheme import PACKED, Decode, Scheme

FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2"})
_FP4_BLOCK = (1, 32)


def fp8_schemes(settings: Mapping[str, Any]) -> tuple[Scheme, ...]:
    """The schemes of a quantization_config of method fp8, mxfp8 or fbgemm_fp8. Raises ValueError for bad settings."""
    method = str(settings.get("quant_method"))
    if method == "fbgemm_fp8":
        return (Scheme(method, ".weight", FLOAT8, _scaled_by(None), {"scale": (".weight_scale",)}),)
    block = settings.get("weight_block_size", [128, 128])
    sized = isinstance(block, list | tuple) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)
    if block is not None and not sized:
        raise ValueError(f"weight_block_size is {block!r}, expected two positive numbers or null")
    dtypes = FLOAT8 | {"I8", "F4"} if settings.get("expert_dtype") == "fp4" else FLOAT8
    decode = _scaled_by(None if block is None else (block[0], block[1]))
    inside = Scheme(method, ".weight", dtypes, decode, {"scale": (".weight_scale_inv", ".scale", ".qscale_weight")})
    return inside, Scheme(method, "", dtypes, decode, {"scale": ("_scale_inv",)})


def _scaled_by(block: tuple[int, int] | None) -> Decode:
    """Codes times scales of blocks of `block` elements; with None, one scale per row, or one for the whole matrix."""

    def decode(parts: Mapping[str, Tensor]) -> Tensor:
        codes, scale = parts[PACKED], scale_values(parts["scale"])
        four_bits = codes.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2)
        values = unpack_e2m1(codes) if four_bits else codes.float()
        if scale.numel() == 1:
            return values * scale.reshape(())
        if values.ndim < 2 or scale.ndim < 2:
            raise ValueError(f"the scales are {list(scale.shape)} for a weight {list(values.shape)}")
        rows, cols = values.shape[-2:]
        if four_bits:
            return values * expand_blocks(scale, rows, cols, _FP4_BLOCK)
        if block is not None:
            return values * expand_blocks(scale, rows, cols, block)
        if scale.shape[-1] != 1 or scale.shape[-2] not in (1, rows):
            raise ValueError(f"the scales are {list(scale.shape)}, expected one a row in a weight [{rows}, {cols}]")
        return values * scale

    return decode
