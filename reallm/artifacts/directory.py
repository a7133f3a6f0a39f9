"""Read and write artifacts: model directories that transformers loads after `import reallm` (see
docs/reference/format.md).

An artifact is written to a hidden folder beside its destination and renamed when it is complete, so that no reader ever
sees half an artifact, and a full disk or Ctrl-C does not change what was there before.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reallm.errors import UserError
from reallm.kernels.storage.layout import CONFIG_FILE

from .manifest import ADAPTERS_FOLDER, MANIFEST_FILE
from .quantization_config import METHOD, QuantizationRecord, read_quantization

CARD_FILE = "README.md"
MAX_CONFIG_BYTES = 1 << 28


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a model folder. Raises UserError if it is missing, damaged or not a JSON object."""
    path = folder / CONFIG_FILE
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise UserError(f"{path} has {path.stat().st_size} bytes; expected at most {MAX_CONFIG_BYTES}")
        config = json.loads(path.read_bytes().decode())
    except FileNotFoundError:
        raise UserError(f"{folder} has no {CONFIG_FILE}; expected the folder of a model") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}; copy the model again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is damaged: expected a JSON object; copy the model again")
    return config


def is_artifact(path: Path | str) -> bool:
    """Whether `path` is an artifact, intact or damaged: a folder whose config.json names reallm's method."""
    folder = Path(path)
    if not (folder / CONFIG_FILE).is_file():
        return False
    quantization = read_config(folder).get("quantization_config")
    return isinstance(quantization, Mapping) and quantization.get("quant_method") == METHOD


def read_record_of(folder: Path) -> QuantizationRecord:
    """Read and check the quantization_config of an artifact. Raises UserError."""
    quantization = read_config(folder).get("quantization_config")
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != METHOD:
        raise UserError(
            f"{folder} is not a reallm artifact (its config.json has no quantization_config of method reallm); "
            "`reallm compile` writes one"
        )
    return read_quantization(quantization)


def adapters_in(folder: Path) -> dict[str, Path]:
    """Name -> folder of the adapters inside an artifact, sorted. Unfinished ones (NAME.partial) are left out."""
    parent = folder / ADAPTERS_FOLDER
    paths = sorted(parent.iterdir()) if parent.is_dir() else []
    return {p.name: p for p in paths if p.is_dir() and not p.name.startswith(".") and p.suffix != ".partial"}


def check_output(output: Path, force: bool, mark: str = MANIFEST_FILE) -> None:
    """Raise UserError unless `output` can be written.

    It may be missing or an empty folder. With `force` it may also be an artifact without adapters, or a folder that
    holds a file `mark`.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output} is a file; expected the name of a folder to create")
    if not any(output.iterdir()):
        return
    if not is_artifact(output) and not (output / mark).is_file():
        raise UserError(f"{output} exists and is not a reallm artifact; give another name or remove it yourself")
    if not force:
        raise UserError(f"{output} exists; give another name, or --force to replace it")
    if adapters := adapters_in(output):
        raise UserError(
            f"{output} holds the adapters {', '.join(adapters)}, which fit no other artifact and would be lost; "
            f"move or remove {output / ADAPTERS_FOLDER} first"
        )


@contextmanager
def new_artifact(output: Path, force: bool = False, mark: str = MANIFEST_FILE) -> Iterator[Path]:
    """Yield a folder to fill. It is renamed to `output` if the block succeeds, and removed if the block raises.

    Raises UserError if `output` exists (see `check_output`), or for an error of the file system.
    """
    check_output(output, force, mark)
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        _replace(partial, output)
    except OSError as error:
        raise UserError(
            f"{output} cannot be written: {error.strerror or error}; nothing was left behind; free some space or give "
            "another place"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(partial: Path, output: Path) -> None:
    """Rename `partial` to `output`. An existing `output` is first moved aside, and moved back if renaming fails."""
    for path in partial.rglob("*"):
        if path.is_file():
            _sync(path)
    old = output.with_name(f".{output.name}.{os.getpid()}.old")
    if output.exists():
        output.rename(old)
    try:
        partial.rename(output)
    except OSError:
        if old.exists():
            old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)
    _sync(output.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
