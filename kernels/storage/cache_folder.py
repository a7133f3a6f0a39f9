"""Where files that can be made again are kept: generated sources and compiled libraries."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$REALLM_CACHE, else $XDG_CACHE_HOME/reallm, else ~/.cache/reallm."""
    if chosen := os.environ.get("REALLM_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reallm"
