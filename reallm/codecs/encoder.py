"""The interface of an encoder: the arguments that every codec's encoder takes, and its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reallm.kernels.formats.formats import Format
from reallm.system.device import CPU

from .metric import Workspace


@dataclass(frozen=True)
class EncodingContext:
    """What an encoder needs besides the matrix and its codec."""

    fmt: Format
    work: Workspace
    """The metric of the matrix to be encoded, with its factorisations."""
    shared: Tensor | None = None
    """Shared codebooks [M, 2^B, d] or the bytes of a shared decoder; None if the format shares nothing."""
    seed: int = 0
    device: torch.device = CPU
    """Where an encoder that has kernels for it does its work; the matrix and the result are on the CPU."""


class CodedMatrix(NamedTuple):
    """The codes chosen for a matrix W[N, K]."""

    values: dict[str, Tensor]
    """The values of each stored field, by field name, before packing."""
    decoded: Tensor
    """What these values decode to, float32 [N, K]."""


Encoder = Callable[[Tensor, Any, EncodingContext], CodedMatrix]
"""(W[N, K] float32, codec, context) -> the codes. The result depends only on the arguments and on the thread count."""
