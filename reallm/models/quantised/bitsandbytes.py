"""What bitsandbytes stores: 4-bit codes of a table with a scale for each block, or int8 with a scale for each row.

4 bits (Dettmers et al., QLoRA, 2023): the first of two codes of a byte is in the high half; the scales of blocks may
be quantised themselves, to codes of a second table with scales of their own and one mean.
8 bits (Dettmers et al., LLM.int8(), 2022): code * SCB / 127.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from .scheme import PACKED, Scheme


def bitsandbytes_schemes() -> tuple[Scheme, ...]:
    """The two schemes of method bitsandbytes."""
    state = ".weight.quant_state.bitsandbytes__"
    four_bits = {
        "scale": (".weight.absmax",),
        "table": (".weight.quant_map",),
        "state": (f"{state}nf4", f"{state}fp4"),
    }
    nested = {"nested_scale": (".weight.nested_absmax",), "nested_table": (".weight.nested_quant_map",)}
    return (
        Scheme("bitsandbytes", ".weight", frozenset({"U8"}), _decode_4_bits, four_bits, nested),
        Scheme(
            "bitsandbytes",
            ".weight",
            frozenset({"I8"}),
            _decode_8_bits,
            {"scale": (".SCB",)},
            {"format": (".weight_format",)},
        ),
    )


def _decode_4_bits(parts: Mapping[str, Tensor]) -> Tensor:
    state = json.loads(bytes(parts["state"].tolist()))
    codes = parts[PACKED].flatten()
    codes = torch.stack((codes >> 4, codes & 15), dim=-1).flatten().long()
    scale = parts["scale"]
    if "nested_scale" in parts:
        blocks = parts["nested_scale"].float().repeat_interleave(state["nested_blocksize"])[: scale.numel()]
        scale = parts["nested_table"].float()[scale.long()] * blocks + state["nested_offset"]
    shape, size = state["shape"], state["blocksize"]
    count = int(torch.tensor(shape).prod())
    if scale.numel() != -(-count // size) or codes.numel() != count + count % 2:
        raise ValueError(f"{scale.numel()} scales and {codes.numel()} codes do not fit a weight {shape}")
    values = parts["table"].float()[codes[:count]] * scale.float().repeat_interleave(size)[:count]
    return values.reshape(shape)


def _decode_8_bits(parts: Mapping[str, Tensor]) -> Tensor:
    codes, scale = parts[PACKED], parts["scale"]
    if "format" in parts and parts["format"].any():
        raise ValueError("weight_format is not that of plain rows")
    if scale.shape != codes.shape[:1]:
        raise ValueError(f"SCB is {list(scale.shape)}, expected one a row in a weight {list(codes.shape)}")
    return (codes.double() * scale.double().unsqueeze(-1) / 127).float()
