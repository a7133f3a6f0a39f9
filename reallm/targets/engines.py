"""The engines that a plan can be made for: what a plan must know about each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from reallm.kernels.formats.formats import Format
from reallm.planner.tables.plan import Ties

from .compressed_tensors.types import compressed_tensors_type
from .gguf.types import gguf_type
from .mlx.types import mlx_type


@dataclass(frozen=True)
class Engine:
    """What a plan must know about an engine."""

    type_of: Callable[[Format, int, int], str | None]
    """(format, rows, cols) -> the engine's name of the type of such a matrix; None if the engine cannot hold it."""
    ties: Ties = "none"
    """Which matrices the engine wants in one format."""
    note: str = "the budget counts reallm's own weights file; `export` prints the exact size of the engine's"
    """How the engine's file differs in size from what a budget counts."""


def _sglang_type(fmt: Format, rows: int, cols: int) -> str | None:
    return compressed_tensors_type(fmt, rows, cols, engine="sglang")


ENGINES: Mapping[str, Engine] = {
    "gguf": Engine(gguf_type),
    "vllm": Engine(compressed_tensors_type, ties="inputs"),
    "sglang": Engine(_sglang_type, ties="inputs"),
    "mlx": Engine(
        mlx_type,
        note="the budget counts reallm's own weights file; in MLX's, every group of weights takes 2 bytes more (its "
        "offset), and `export` prints the exact size",
    ),
}
"""Target -> what a plan must know about its engine: llama.cpp for "gguf"."""
