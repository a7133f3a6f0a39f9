"""The artifact: a model directory that transformers understands, whole or not there at all. Format: docs/format.md.

It is written to a hidden folder beside its place and renamed when complete, so no reader ever sees half of one, and a
full disk or Ctrl-C leaves what was there before.
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

from .manifest import ADAPTERS_FOLDER, MANIFEST_FILE
from .quantization_config import METHOD, QuantizationRecord, read_quantization

CONFIG_FILE = "config.json"
PLAN_FILE = "plan.json"
CARD_FILE = "README.md"
MAX_CONFIG_BYTES = 1 << 28


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises UserError when it is missing, damaged or no object."""
    path = folder / CONFIG_FILE
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise UserError(f"{path} has {path.stat().st_size} bytes, at most {MAX_CONFIG_BYTES} are expected")
        config = json.loads(path.read_bytes().decode())
    except FileNotFoundError:
        raise UserError(f"{folder} has no {CONFIG_FILE}: it is no model folder") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}; copy the model again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is damaged: expected a JSON object; copy the model again")
    return config


def is_artifact(path: Path | str) -> bool:
    """Whether `path` is a folder that reallm packed (whole or damaged)."""
    folder = Path(path)
    if not (folder / CONFIG_FILE).is_file():
        return False
    quantization = read_config(folder).get("quantization_config")
    return isinstance(quantization, Mapping) and quantization.get("quant_method") == METHOD


def read_record_of(folder: Path) -> QuantizationRecord:
    """The checked quantization_config of an artifact. Raises UserError."""
    quantization = read_config(folder).get("quantization_config")
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != METHOD:
        raise UserError(f"{folder} is no reallm artifact: its config.json has no quantization_config of method reallm")
    return read_quantization(quantization)


def adapters_in(folder: Path) -> dict[str, Path]:
    """Name -> folder of the adapters inside an artifact, by name; runs in progress (NAME.partial) are none."""
    place = folder / ADAPTERS_FOLDER
    found = sorted(place.iterdir()) if place.is_dir() else []
    return {p.name: p for p in found if p.is_dir() and not p.name.startswith(".") and p.suffix != ".partial"}


def check_output(output: Path, force: bool, mark: str = MANIFEST_FILE) -> None:
    """Raise UserError unless `output` is free, or may be replaced: an artifact, or a folder with `mark`."""
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output} is a file; expected the name of a folder to write")
    if not any(output.iterdir()):
        return
    if not is_artifact(output) and not (output / mark).is_file():
        raise UserError(f"{output} exists and is no artifact of reallm; give another name or remove it yourself")
    if not force:
        raise UserError(f"{output} exists; give another name, or --force to replace it")
    if held := adapters_in(output):
        raise UserError(
            f"{output} holds the adapters {', '.join(held)}, which fit no other artifact and would be lost; "
            f"move or remove {output / ADAPTERS_FOLDER} first"
        )


@contextmanager
def new_artifact(output: Path, force: bool = False, mark: str = MANIFEST_FILE) -> Iterator[Path]:
    """A folder to fill; it takes the name `output` when the block ends well and vanishes when it does not.

    Raises UserError when `output` is taken, or when the disk is full or refuses.
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
            f"{output} cannot be written: {error.strerror or error}; nothing was left, free space or give another place"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(partial: Path, output: Path) -> None:
    """Move `partial` to `output`; an artifact already there is put aside first and put back if the move fails."""
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
