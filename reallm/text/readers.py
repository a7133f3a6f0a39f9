"""Documents from files (.txt, .jsonl, .parquet) and from the `datasets` library."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from reallm.errors import UserError

from .documents import CHAT_COLUMN, TEXT_COLUMN, TOOLS_COLUMN, Document, document_of, without_nulls

MAX_DATASET_CHARACTERS = 64 * 2**20
"""Number of characters after which reading a streamed data set stops; it is enough for any calibration."""


class ReadDocuments(NamedTuple):
    """Documents in the order of their source."""

    documents: tuple[Document, ...]
    places: tuple[str, ...]
    """Where each document stands, for error messages: the path with a line or row number."""


def read_text_file(path: Path) -> ReadDocuments:
    """Read a .txt file as one document."""
    return ReadDocuments((_decoded(path),), (str(path),))


def _decoded(path: Path) -> str:
    """Read a UTF-8 file; a byte order mark is removed."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); expected UTF-8 text: convert the file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; check the path and its permissions") from None


def read_jsonl(path: Path) -> ReadDocuments:
    """Read a .jsonl file with one document per line: an object with `text`, or with `messages` and perhaps `tools`."""
    documents, places = [], []
    for number, line in enumerate(_decoded(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON ({error}); expected one object per line") from None
        documents.append(document_of(row, where))
        places.append(where)
    return ReadDocuments(tuple(documents), tuple(places))


def read_parquet(path: Path) -> ReadDocuments:
    """Read a .parquet file with one document per row, from the column `text`, or else `messages` (and `tools`)."""
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
        columns = [TEXT_COLUMN] if TEXT_COLUMN in names else [n for n in (CHAT_COLUMN, TOOLS_COLUMN) if n in names]
        if not {TEXT_COLUMN, CHAT_COLUMN} & set(columns):
            raise UserError(
                f"{path} has the columns {', '.join(names)}; expected one called {TEXT_COLUMN} or {CHAT_COLUMN}: "
                "rename the column"
            )
        rows = pyarrow.parquet.read_table(path, columns=columns).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} cannot be read as parquet ({reason}); get the file again") from None
    places = tuple(f"{path} row {number}" for number in range(1, len(rows) + 1))
    if TEXT_COLUMN in columns:
        return ReadDocuments(_texts([row[TEXT_COLUMN] for row in rows], path), places)
    documents = (document_of(without_nulls(row), where) for row, where in zip(rows, places, strict=True))
    return ReadDocuments(tuple(documents), places)


def _texts(column: list[object], path: Path) -> tuple[str, ...]:
    """The texts of a column, with an empty text for null. Raises UserError if it holds anything else."""
    texts = tuple(value or "" for value in column if value is None or isinstance(value, str))
    if len(texts) < len(column):
        raise UserError(f"{path} has a column {TEXT_COLUMN} that holds no strings; expected one text per row")
    return texts


def read_dataset(source: str, split: str, max_characters: int | None = None) -> tuple[ReadDocuments, str]:
    """Read the data set NAME, NAME:SPLIT or NAME:CONFIG:SPLIT: (documents, description).

    NAME is a name on the hub or a local folder. Rows are streamed until `max_characters` is reached (None:
    MAX_DATASET_CHARACTERS); the description says so if that leaves out rows. `split` is used if `source` does not name
    a split. Raises UserError if the data set, its split or its text column is not available.
    """
    from datasets import load_dataset

    name, *rest = source.split(":")
    if not name or len(rest) > 2 or not all(rest):
        raise UserError(f"--text {source}: expected a file, NAME, NAME:SPLIT or NAME:CONFIG:SPLIT of a data set")
    split = rest[-1] if rest else split
    config = rest[0] if len(rest) == 2 else None
    try:
        rows = load_dataset(name, config, split=split, streaming=True)
        read, cut = _take(rows, source, max_characters or MAX_DATASET_CHARACTERS)
    except UserError:
        raise
    except Exception as error:  # the builder of each file type and the network client raise their own kinds
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        what = f"--text {source}: there is no such file, and no data set can be loaded by that name ({reason})"
        raise UserError(
            f"{what}; give a .txt, .jsonl or .parquet file, or check the name and the connection"
        ) from error
    part = f", its first {len(read.documents)} rows" if cut else ""
    return read, f"data set {name}{f' ({config})' if config else ''}, split {split}{part}"


def _take(rows: Iterator[Mapping[str, Any]], source: str, max_characters: int) -> tuple[ReadDocuments, bool]:
    """Take documents from `rows` up to `max_characters`: (documents, whether the limit was reached)."""
    documents: list[Document] = []
    characters = 0
    for number, row in enumerate(rows, start=1):
        document = document_of(without_nulls(row), f"--text {source} row {number}")
        documents.append(document)
        characters += len(document) if isinstance(document, str) else document.characters
        if characters >= max_characters:
            break
    places = tuple(f"--text {source} row {number}" for number in range(1, len(documents) + 1))
    return ReadDocuments(tuple(documents), places), characters >= max_characters
