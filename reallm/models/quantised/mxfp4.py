"""4-bit floats with a power of two for each 32 of them: the experts of gpt-oss (OCP Microscaling Formats 1.0)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .blocks import powers_of_two, unpack_e2m1
from .scheme import PACKED, Scheme


def mxfp4_schemes() -> tuple[Scheme, ...]:
    """The scheme of method mxfp4: `X_blocks` uint8 [experts, out, in / 32, 16] and `X_scales` [experts, out, in / 32].

    The weight `X` is [experts, in, out].
    """
    return (Scheme("mxfp4", "_blocks", frozenset({"U8"}), _decode, {"scale": ("_scales",)}, weight=""),)


def _decode(parts: Mapping[str, Tensor]) -> Tensor:
    values, scale = unpack_e2m1(parts[PACKED]), parts["scale"]
    if values.ndim != 4 or scale.shape != values.shape[:-1]:
        raise ValueError(f"the scales are {list(scale.shape)}, expected {list(values.shape[:-1])}")
    return (values * powers_of_two(scale).unsqueeze(-1)).flatten(-2).transpose(-1, -2).contiguous()
