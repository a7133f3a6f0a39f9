"""manifest.json: the files and tensors of a finished artifact, so that one changed bit in them is noticed.

It lists the size and sha256 of every guarded file and the sha256 of every tensor. Its own bytes are guarded twice: they
must be the canonical JSON of their content, and `digest` is the sha256 of that JSON without `digest`.

A published folder also holds files that do not affect the model: its card, licences, pictures and the files of git and
of the hub. Such files are called free: they may be added, changed and removed, and the manifest does not list
them. Every other file is guarded: it must be listed, and may not change. That covers all that transformers, PEFT or
Python would act on (weights, config.json, tokenizer files, chat templates, plan.json, code, kernels), and files
of any other kind. The folders of adapters in `adapters/` are not part of the artifact; `bundled_adapters` checks them
separately.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from platform import python_version
from typing import Literal

from pydantic import Field, ValidationError, field_validator

from reallm.errors import UserError
from reallm.kernels.storage.atomic import canonical_json, sha256_text, write_text_atomic
from reallm.planner.tables.records import Record

MANIFEST_FILE = "manifest.json"
ADAPTERS_FOLDER = "adapters"
"""The folder for adapters inside an artifact. It is not in the manifest, so adapters may be added and removed."""
FREE_SUFFIXES = frozenset({".md", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp"})
"""Suffixes of cards and pictures, in lower case."""
FREE_STEMS = frozenset({"license", "licence", "notice", "copying"})
"""What the names of licence texts begin with, up to the first "." or "-", in lower case."""
TEXT_SUFFIXES = frozenset({"", ".txt", ".rst"})
"""Suffixes that a licence text may have, apart from FREE_SUFFIXES."""
FREE_NAMES = frozenset({".gitattributes", ".gitignore", ".gitkeep", ".ds_store"})
"""Names of files of git and of file managers, in lower case."""
FREE_FOLDERS = frozenset({".git", ".cache", ".huggingface"})
"""Top-level folders of git and of hub downloads; nothing in them is read."""
MAX_MANIFEST_BYTES = 1 << 30
CHUNK_BYTES = 1 << 22
_FILE_NAME = re.compile(r"(?!\.)[\w.+-]+(/(?!\.)[\w.+-]+)*")
_SHA256 = r"^[0-9a-f]{64}$"


class FileEntry(Record):
    """One file of the artifact."""

    nbytes: int = Field(ge=0)
    sha256: str = Field(pattern=_SHA256)


class Manifest(Record):
    """The content of manifest.json."""

    version: Literal[1] = 1
    files: Mapping[str, FileEntry]
    """Relative path -> entry, for every guarded file except manifest.json. Free files listed by older versions are
    ignored."""
    tensors: Mapping[str, str]
    """Tensor name -> sha256 of its bytes."""
    model_sha256: str
    plan_sha256: str = Field(pattern=_SHA256)
    toolchain: Mapping[str, str]
    """Package, or "python" -> its version when the artifact was written."""
    digest: str = ""

    @field_validator("files")
    @classmethod
    def _plain_names(cls, files: Mapping[str, FileEntry]) -> Mapping[str, FileEntry]:
        for name in files:
            if not _FILE_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not a plain relative path")
        return files

    def guarded(self) -> dict[str, FileEntry]:
        """The listed files that are guarded."""
        return {name: entry for name, entry in self.files.items() if not is_free(name)}


def is_free(name: str) -> bool:
    """Whether the file at the relative path `name` may be added, changed and removed (see the module's docstring).

    >>> is_free("README.md"), is_free("images/Loss.PNG"), is_free("LICENSE"), is_free(".cache/huggingface/x.metadata")
    (True, True, True, True)
    >>> is_free("modeling_x.py"), is_free("vocab.txt"), is_free("notes.bin"), is_free("LICENSE.py"), is_free(".env")
    (False, False, False, False, False)
    """
    path = PurePosixPath(name)
    if len(path.parts) > 1 and path.parts[0] in FREE_FOLDERS:
        return True
    lower, suffix = path.name.lower(), path.suffix.lower()
    if lower.partition(".")[0].partition("-")[0] in FREE_STEMS and suffix in TEXT_SUFFIXES:
        return True
    return lower in FREE_NAMES or suffix in FREE_SUFFIXES


def toolchain() -> dict[str, str]:
    """The versions of Python and of the packages that affect the bytes of an artifact, by name."""
    packages = ("reallm", "numpy", "torch", "transformers", "safetensors")
    return {"python": python_version()} | {name: version(name) for name in packages}


def sha256_file(path: Path) -> str:
    """The sha256 of a file, in hexadecimal; the file is read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """(relative path, path) of every file in `folder`, except the manifest and everything inside `adapters/`."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        of_adapters = len(relative.parts) > 1 and relative.parts[0] == ADAPTERS_FOLDER
        if path.is_file() and not of_adapters and relative.as_posix() != MANIFEST_FILE:
            yield relative.as_posix(), path


def artifact_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """(relative path, path) of every guarded file in `folder`, except the manifest."""
    return ((name, path) for name, path in _files(folder) if not is_free(name))


def free_files(folder: Path) -> tuple[str, ...]:
    """Relative paths of the free files in `folder`; a folder of FREE_FOLDERS is one entry, its name and a slash."""
    found = (name for name, _ in _files(folder) if is_free(name))
    return tuple(dict.fromkeys(f"{n.split('/')[0]}/" if n.split("/")[0] in FREE_FOLDERS else n for n in found))


def _sealed(manifest: Manifest) -> str:
    """The text of `manifest` with its digest filled in."""
    value = manifest.model_dump(mode="json", exclude={"digest"})
    return canonical_json({**value, "digest": sha256_text(canonical_json(value))})


def write_manifest(folder: Path, tensors: Mapping[str, str], model_sha256: str, plan_sha256: str) -> None:
    """Hash every guarded file of `folder` and write its manifest.json."""
    files = {
        name: FileEntry(nbytes=path.stat().st_size, sha256=sha256_file(path)) for name, path in artifact_files(folder)
    }
    manifest = Manifest(
        files=files, tensors=dict(tensors), model_sha256=model_sha256, plan_sha256=plan_sha256, toolchain=toolchain()
    )
    write_text_atomic(folder / MANIFEST_FILE, _sealed(manifest))


def artifact_digest(folder: Path) -> str | None:
    """The sha256 that adapters name the artifact in `folder` by: that of its manifest; None if it has none."""
    path = folder / MANIFEST_FILE
    return sha256_file(path) if path.is_file() else None


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of `folder`. Raises UserError if it is missing, or was changed since it was written."""
    path = folder / MANIFEST_FILE
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise UserError(f"{path} has {path.stat().st_size} bytes; expected at most {MAX_MANIFEST_BYTES}")
        text = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no {MANIFEST_FILE}, so it is not a complete artifact; `reallm compile` writes one"
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
