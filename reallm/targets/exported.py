"""What an export wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Exported:
    """A file or folder written for an engine.

    >>> reallm.Exported("small.gguf", 95_046_656, {"model.layers.0.mlp.up_proj": "Q4_0"}).types
    {'model.layers.0.mlp.up_proj': 'Q4_0'}
    """

    path: Path
    nbytes: int
    """Bytes of the weights files, headers included."""
    types: Mapping[str, str]
    """Matrix name -> the engine's name of the type that it has in the file, of all packed matrices."""
    notes: tuple[str, ...] = ()
    """Remarks for the user, one sentence each."""
