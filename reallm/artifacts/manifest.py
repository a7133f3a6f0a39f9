"""manifest.json: what a finished artifact consists of, so that one changed bit anywhere is noticed.

It lists size and sha256 of every other file and sha256 of every tensor. Its own bytes are guarded twice: they must be
the canonical JSON of what they say, and `digest` is the sha256 of that JSON without `digest`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Literal

from pydantic import Field, ValidationError, field_validator

from reallm.errors import UserError
from reallm.kernels.storage.atomic import canonical_json, sha256_text, write_text_atomic
from reallm.planner.tables.records import Record

MANIFEST_FILE = "manifest.json"
ADAPTERS_FOLDER = "adapters"
"""In an artifact, but no part of it: adapters come and go, and the artifact stays what was compiled."""
MAX_MANIFEST_BYTES = 1 << 30
CHUNK_BYTES = 1 << 22
_FILE_NAME = re.compile(r"(?!\.)[\w.+-]+(/(?!\.)[\w.+-]+)*")
_SHA256 = r"^[0-9a-f]{64}$"


class FileEntry(Record):
    """One file of the artifact."""

    nbytes: int = Field(ge=0)
    sha256: str = Field(pattern=_SHA256)


class Manifest(Record):
    """What manifest.json holds."""

    version: Literal[1] = 1
    files: Mapping[str, FileEntry]
    """Relative path -> entry, of every file but this one."""
    tensors: Mapping[str, str]
    """Tensor name -> sha256 of its bytes."""
    model_sha256: str
    plan_sha256: str = Field(pattern=_SHA256)
    toolchain: Mapping[str, str]
    """Package -> version that wrote the artifact."""
    digest: str = ""

    @field_validator("files")
    @classmethod
    def _plain_names(cls, files: Mapping[str, FileEntry]) -> Mapping[str, FileEntry]:
        for name in files:
            if not _FILE_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no plain relative path")
        return files


def toolchain() -> dict[str, str]:
    """The versions that decide the bytes of an artifact."""
    packages = ("reallm", "numpy", "torch", "transformers", "safetensors")
    return {"python": python_version()} | {name: version(name) for name in packages}


def sha256_file(path: Path) -> str:
    """Hex digest of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def artifact_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """(relative path, path) of every file of the artifact but the manifest.

    Hidden ones (.git, .cache) and what lies in the folder of adapters are no part of it.
    """
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        beside = len(relative.parts) > 1 and relative.parts[0] == ADAPTERS_FOLDER
        if path.is_file() and not beside and not any(part.startswith(".") for part in relative.parts):
            name = relative.as_posix()
            if name != MANIFEST_FILE:
                yield name, path


def _sealed(manifest: Manifest) -> str:
    """Text of `manifest` with its digest filled in."""
    value = manifest.model_dump(mode="json", exclude={"digest"})
    return canonical_json({**value, "digest": sha256_text(canonical_json(value))})


def write_manifest(folder: Path, tensors: Mapping[str, str], model_sha256: str, plan_sha256: str) -> None:
    """Hash every file of `folder` and write its manifest.json."""
    files = {
        name: FileEntry(nbytes=path.stat().st_size, sha256=sha256_file(path)) for name, path in artifact_files(folder)
    }
    manifest = Manifest(
        files=files, tensors=dict(tensors), model_sha256=model_sha256, plan_sha256=plan_sha256, toolchain=toolchain()
    )
    write_text_atomic(folder / MANIFEST_FILE, _sealed(manifest))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of `folder`, itself unchanged since it was written. Raises UserError."""
    path = folder / MANIFEST_FILE
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise UserError(f"{path} has {path.stat().st_size} bytes, at most {MAX_MANIFEST_BYTES} are expected")
        text = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no {MANIFEST_FILE}: it is no whole artifact; `reallm compile` writes one"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise UserError(f"{path} was changed or damaged: {error.errors()[0]['msg']}; copy the artifact again") from None
    if _sealed(manifest).encode() != text:
        raise UserError(f"{path} was changed after it was written: its digest does not match; copy the artifact again")
    return manifest
