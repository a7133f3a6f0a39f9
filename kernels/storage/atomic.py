"""Atomic file writing, and JSON that has the same bytes on every machine."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from uuid import uuid4


def canonical_json(value: object) -> str:
    """JSON text of `value` with sorted keys; the same value gives the same text on every machine."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False) + "\n"


def sha256_text(text: str) -> str:
    """Hex sha256 of `text` in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def partial_path(path: Path) -> Path:
    """A temporary name beside `path`, different on every call: process ids may repeat across machines."""
    return path.with_name(f".{path.name}.{uuid4().hex[:12]}.partial")


def write_text_atomic(path: Path, text: str) -> None:
    """`write_bytes_atomic` of `text` in UTF-8."""
    write_bytes_atomic(path, text.encode())


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Replace the file `path` by `data`. A reader sees the old file or the complete new one, even after kill -9."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        with partial.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
