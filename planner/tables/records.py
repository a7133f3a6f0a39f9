"""Records that the commands of reallm pass to each other as JSON files. pydantic checks them when they are read.

An unknown field, a missing field or a number out of range raises RecordError, which names the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from reallm.kernels.errors import ReallmError
from reallm.kernels.storage.atomic import canonical_json, write_text_atomic

R = TypeVar("R", bound=BaseModel)


class RecordError(ReallmError, ValueError):
    """A file written by reallm that cannot be read. The message names the file, what was found and how to proceed."""


class Record(BaseModel):
    """An immutable record that rejects unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def write_record(path: Path, record: BaseModel) -> None:
    """Write `record` as canonical JSON, atomically."""
    write_text_atomic(path, canonical_json(record.model_dump(mode="json")))


def read_record(path: Path, kind: type[R], made_by: str) -> R:
    """Read a record of type `kind`.

    Raises RecordError, which names the file and the command (`made_by`) that writes it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecordError(f"{path} does not exist; `reallm {made_by}` makes it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path} cannot be read: {error}") from None
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise RecordError(f"{path} is not what `reallm {made_by}` writes: {where}: {first['msg']}") from None
