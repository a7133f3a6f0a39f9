"""What an export wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Exported:
    """A file or folder written for an engine."""

    path: Path
    nbytes: int
    """Bytes of the weights files, headers included."""
    types: Mapping[str, str]
    """Matrix name -> the engine's name of the type that it has in the file, of all packed matrices."""
    notes: tuple[str, ...] = ()
    """Remarks for the user, one sentence each."""
