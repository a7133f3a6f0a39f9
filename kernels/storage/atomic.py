"""Files that are either the old one or the whole new one, and JSON with the same bytes on every machine."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from uuid import uuid4


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no platform-dependent bytes: the same value gives the same text everywhere."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False) + "\n"


def sha256_text(text: str) -> str:
    """Hex digest of `text` in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def partial_path(path: Path) -> Path:
    """A name beside `path` to write it under, its own on every call: two machines may have a process of one number."""
    return path.with_name(f".{path.name}.{uuid4().hex[:12]}.partial")


def write_text_atomic(path: Path, text: str) -> None:
    """`write_bytes_atomic` of `text` in UTF-8."""
    write_bytes_atomic(path, text.encode())


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write a file that is either the old one or the whole new one, also under kill -9."""
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
