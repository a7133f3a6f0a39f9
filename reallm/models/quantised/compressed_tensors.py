"""The formats of compressed-tensors: integers packed into words, int8, 8-bit floats and 4-bit floats, with scales.

The weight is (code - zero point) * scale. `config_groups` gives bits, groups and blocks, which may differ from layer to
layer; a layer's own are those that fit the shapes of its tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .blocks import expand_blocks, scale_values, unpack_e2m1, unpack_words
from .fp8 import FLOAT8
from .scheme import PACKED, Scheme

_FORMATS = frozenset(
    {"pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision"}
    | {"nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"}
)


@dataclass(frozen=True)
class _Layout:
    """What the groups of a configuration allow."""

    bits: frozenset[int]
    group_sizes: frozenset[int]
    blocks: frozenset[tuple[int, int]]


def compressed_tensors_schemes(settings: Mapping[str, Any]) -> tuple[Scheme, ...]:
    """The schemes of a quantization_config of method compressed-tensors. Raises ValueError for unsupported settings."""
    groups = [group for group in dict(settings.get("config_groups") or {}).values() if isinstance(group, Mapping)]
    formats = {settings.get("format"), *(group.get("format") for group in groups)} - {None}
    if not groups or not formats <= _FORMATS:
        raise ValueError(f"format is {', '.join(sorted(map(str, formats)))}, expected {', '.join(sorted(_FORMATS))}")
    sparsity = dict(settings.get("sparsity_config") or {}).get("format", "dense")
    if settings.get("transform_config") or sparsity != "dense":
        raise ValueError("transform_config or sparsity_config is set: the weights are rotated or packed as sparse ones")
    layout = _layout([group["weights"] for group in groups if isinstance(group.get("weights"), Mapping)])
    method, parts = "compressed-tensors", {"scale": (".weight_scale",)}
    extra = {"zeros": (".weight_zero_point",), "groups": (".weight_g_idx",)}
    plain = partial(_decode_plain, layout=layout)
    words, four_bits = partial(_decode_words, layout=layout), {"global_scale": (".weight_global_scale",)}
    return (
        Scheme(method, ".weight", FLOAT8 | {"I8"}, plain, parts, extra),
        Scheme(
            method,
            ".weight_packed",
            frozenset({"I32"}),
            words,
            parts | {"shape": (".weight_shape",)},
            extra,
            weight=".weight",
        ),
        Scheme(method, ".weight_packed", frozenset({"U8"}), _decode_four_bits, parts, four_bits, weight=".weight"),
    )


def _layout(weights: Iterable[Mapping[str, Any]]) -> _Layout:
    bits, sizes, blocks = set(), set(), set()
    for arguments in weights:
        bits.add(int(arguments.get("num_bits", 8)))
        if isinstance(size := arguments.get("group_size"), int) and size > 0:
            sizes.add(size)
        if block := arguments.get("block_structure"):
            blocks.add((int(block[0]), int(block[1])))
    return _Layout(frozenset(bits), frozenset(sizes), frozenset(blocks))


def _decode_plain(parts: Mapping[str, Tensor], layout: _Layout) -> Tensor:
    zeros = parts.get("zeros")
    return _scaled(parts[PACKED].float(), parts, None if zeros is None else zeros.float(), layout)


def _decode_words(parts: Mapping[str, Tensor], layout: _Layout) -> Tensor:
    rows, cols = (int(size) for size in parts["shape"].tolist())
    packed, scale = parts[PACKED], parts["scale"]
    fitting = [b for b in sorted(layout.bits) if b in (2, 4, 8) and tuple(packed.shape) == (rows, -(-cols * b // 32))]
    if len(fitting) != 1:
        raise ValueError(
            f"{list(packed.shape)} words for a weight [{rows}, {cols}] do not have 2, 4 or 8 bits per weight"
        )
    bits = fitting[0]
    offset = 1 << (bits - 1)
    codes = unpack_words(packed, bits)[:, :cols] - offset
    zeros = parts.get("zeros")
    if zeros is not None:
        words = zeros.T.contiguous()  # packed along the rows
        zeros = (unpack_words(words, bits)[:, :rows] - offset).T if zeros.dtype == torch.int32 else zeros
        if zeros.shape != scale.shape:
            raise ValueError(f"the zero points are {list(zeros.shape)}, the scales {list(scale.shape)}")
    return _scaled(codes.float(), parts, None if zeros is None else zeros.float(), layout)


def _decode_four_bits(parts: Mapping[str, Tensor]) -> Tensor:
    values, scale = unpack_e2m1(parts[PACKED]), scale_values(parts["scale"])
    rows, cols = values.shape
    if "global_scale" in parts:
        scale = scale / parts["global_scale"].float()
    if cols % scale.shape[-1] or cols // scale.shape[-1] != (16 if "global_scale" in parts else 32):
        raise ValueError(f"the scales are {list(scale.shape)} for a weight [{rows}, {cols}] of 4-bit floats")
    return values * expand_blocks(scale, rows, cols, (1, cols // scale.shape[-1]))


def _scaled(codes: Tensor, parts: Mapping[str, Tensor], zeros: Tensor | None, layout: _Layout) -> Tensor:
    """(codes - zeros) * scale for scales of the whole matrix, a row, a group of columns of a row, or a block."""
    scale = scale_values(parts["scale"])
    if zeros is not None and zeros.numel() != scale.numel():
        raise ValueError(f"the zero points are {list(zeros.shape)}, the scales {list(scale.shape)}")
    if scale.numel() == 1:
        return (codes if zeros is None else codes - zeros.reshape(())) * scale.reshape(())
    rows, cols = codes.shape[-2:]
    if scale.ndim < 2:
        raise ValueError(f"the scales are {list(scale.shape)} for a weight [{rows}, {cols}]")
    spread = partial(_spread, rows=rows, cols=cols, owner=parts.get("groups"), layout=layout)
    return (codes if zeros is None else codes - spread(zeros.reshape(scale.shape))) * spread(scale)


def _spread(scale: Tensor, rows: int, cols: int, owner: Tensor | None, layout: _Layout) -> Tensor:
    """One scale for each element of a weight [rows, cols]. Raises ValueError if no group or block fits."""
    if scale.shape[-2:] == (rows, 1):
        return scale.expand(*scale.shape[:-1], cols)
    if owner is not None and bool((owner >= 0).all()):
        if owner.shape != (cols,) or int(owner.max()) >= scale.shape[-1] or scale.shape[-2] != rows:
            raise ValueError(f"weight_g_idx {list(owner.shape)} does not fit scales {list(scale.shape)}")
        return scale[..., owner.long()]
    blocks = [(1, size) for size in layout.group_sizes if cols % size == 0] + list(layout.blocks)
    fitting = [b for b in blocks if tuple(scale.shape[-2:]) == (-(-rows // b[0]), -(-cols // b[1]))]
    if len(fitting) != 1:
        raise ValueError(f"the scales are {list(scale.shape)}, which fits no group of a weight [{rows}, {cols}]")
    return expand_blocks(scale, rows, cols, fitting[0])
