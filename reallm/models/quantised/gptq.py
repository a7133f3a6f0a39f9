"""Integers with a scale and a zero point for each group of inputs: GPTQ and AWQ, packed into 32-bit words.

Both store the weight transposed, `qweight` for [in, out], and compute (code - zero) * scale. GPTQ packs along the
inputs, stores each zero point less one modulo 2^bits (in the format called gptq), and lists the group of each input in
`g_idx` (Frantar et al., 2023); AWQ packs along the outputs, in another order within each word (Lin et al., 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .blocks import unpack_words
from .scheme import PACKED, Scheme

_WORDS = frozenset({"I32"})
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""For each output of a word, the place of its code."""


def gptq_schemes(settings: Mapping[str, Any]) -> tuple[Scheme, ...]:
    """The scheme of a quantization_config of method gptq. Raises ValueError for settings that are not supported."""
    bits, layout = settings.get("bits"), settings.get("checkpoint_format", "gptq")
    if bits not in (2, 4, 8):
        raise ValueError(f"bits is {bits!r}, expected 2, 4 or 8")
    if layout not in ("gptq", "gptq_v2", "", None):
        raise ValueError(f"checkpoint_format is {layout!r}, expected 'gptq' or 'gptq_v2'")
    if settings.get("dynamic") or settings.get("pack_dtype", "int32") != "int32":
        raise ValueError("dynamic or pack_dtype is set, which differ from layer to layer or pack into other words")
    decode = partial(_decode_gptq, bits=bits, group_size=settings.get("group_size"), offset=int(layout != "gptq_v2"))
    parts = {"zeros": (".qzeros",), "scale": (".scales",)}
    return (Scheme("gptq", ".qweight", _WORDS, decode, parts, {"groups": (".g_idx",)}, weight=".weight"),)


def awq_schemes(settings: Mapping[str, Any]) -> tuple[Scheme, ...]:
    """The scheme of a quantization_config of method awq. Raises ValueError for settings that are not supported."""
    bits, version = settings.get("bits", settings.get("w_bit")), str(settings.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm":
        raise ValueError(f"bits is {bits!r} and version {version!r}, expected 4 and 'gemm'")
    parts = {"zeros": (".qzeros",), "scale": (".scales",)}
    return (Scheme("awq", ".qweight", _WORDS, _decode_awq, parts, weight=".weight"),)


def _decode_gptq(parts: Mapping[str, Tensor], bits: int, group_size: object, offset: int) -> Tensor:
    codes = unpack_words(parts[PACKED].T, bits)  # [out, in]
    scale = parts["scale"].float()  # [groups, out]
    zeros = (unpack_words(parts["zeros"], bits)[:, : scale.shape[1]] + offset) & ((1 << bits) - 1)
    cols, groups = codes.shape[1], scale.shape[0]
    size = group_size if isinstance(group_size, int) and group_size > 0 else cols
    if zeros.shape != scale.shape or codes.shape[0] != scale.shape[1] or groups != -(-cols // size):
        raise ValueError(f"scales {list(scale.shape)} do not fit a weight {list(codes.shape)} in groups of {size}")
    owner = parts["groups"].long() if "groups" in parts else torch.arange(cols) // size
    if owner.shape != (cols,) or int(owner.min()) < 0 or int(owner.max()) >= groups:
        raise ValueError(f"g_idx is {list(owner.shape)}, expected [{cols}] with values below {groups}")
    return (codes - zeros.T[:, owner]) * scale.T[:, owner]


def _decode_awq(parts: Mapping[str, Tensor]) -> Tensor:
    codes, scale = _awq_order(unpack_words(parts[PACKED], 4)), parts["scale"].float()  # [in, out], [groups, out]
    zeros = _awq_order(unpack_words(parts["zeros"], 4))
    groups = scale.shape[0]
    if zeros.shape != scale.shape or codes.shape[1] != scale.shape[1] or codes.shape[0] % groups:
        raise ValueError(f"scales {list(scale.shape)} do not fit a weight {list(codes.T.shape)}")
    size = codes.shape[0] // groups
    return ((codes - zeros.repeat_interleave(size, 0)) * scale.repeat_interleave(size, 0)).T.contiguous()


def _awq_order(codes: Tensor) -> Tensor:
    """The codes of each word, [n, out], in the order of the outputs."""
    return codes.reshape(codes.shape[0], -1, 8)[..., list(_AWQ_PLACES)].flatten(-2)
