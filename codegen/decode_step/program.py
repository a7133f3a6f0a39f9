"""The result of generating a decode step: its C++ source, and what a run must supply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .operations import Weight

CacheDtype = Literal["f32", "bf16"]
"""The dtype of cached keys and values."""


@dataclass(frozen=True, slots=True)
class StepProgram:
    """The C++ source of a decode step, and what a run must supply, in the order in which the source expects it."""

    source: str
    weights: tuple[Weight, ...]
    vectors: tuple[str, ...]
    """Names of the modules whose weights the norms use."""
    tables: tuple[str, ...]
    """Names of the tables of rotary angles."""
    scratch: int
    """Size of the scratch area in floats per token, without the space for prepared inputs of matrices."""
    layers: int
    kv_heads: int
    head_dim: int
    cache: CacheDtype
