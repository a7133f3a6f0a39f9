"""Documents from files (.txt, .jsonl, .parquet) and from the `datasets` library."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from reallm.errors import UserError

Message = dict[str, str]
"""One turn of a conversation: {"role": ..., "content": ...}."""
Document = str | tuple[Message, ...]
"""Plain text, or a conversation that still needs a chat template."""

TEXT_COLUMN, CHAT_COLUMN = "text", "messages"
MAX_DATASET_CHARACTERS = 64 * 2**20
"""Number of characters after which reading a streamed data set stops; it is enough for any calibration."""


def read_text_file(path: Path) -> tuple[Document, ...]:
    """Read a .txt file as one document."""
    return (_decoded(path),)


def _decoded(path: Path) -> str:
    """Read a UTF-8 file; a byte order mark is removed."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); expected UTF-8 text: convert the file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; check the path and its permissions") from None


def read_jsonl(path: Path) -> tuple[Document, ...]:
    """Read a .jsonl file with one document per line: an object with `text`, or with `messages` (a list of Message)."""
    documents = []
    for number, line in enumerate(_decoded(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON ({error}); expected one object per line") from None
        documents.append(_document(row, where))
    return tuple(documents)


def _document(row: object, where: str) -> Document:
    """The document in one row. Raises UserError, naming the row as `where`, if it has neither text nor messages."""
    if isinstance(row, Mapping):
        text, messages = row.get(TEXT_COLUMN), row.get(CHAT_COLUMN)
        if isinstance(text, str):
            return text
        if isinstance(messages, list) and messages and all(_is_message(message) for message in messages):
            return tuple({"role": message["role"], "content": message["content"]} for message in messages)
    content = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
    expected = f'expected "{TEXT_COLUMN}": a string, or "{CHAT_COLUMN}": a list of {{"role", "content"}}'
    raise UserError(f"{where} holds {content or 'nothing'}; {expected}")


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def read_parquet(path: Path) -> tuple[Document, ...]:
    """Read a .parquet file with one document per row, from the string column `text`."""
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
        if TEXT_COLUMN not in names:
            raise UserError(
                f"{path} has the columns {', '.join(names)}; expected one called {TEXT_COLUMN}: rename the column"
            )
        column = pyarrow.parquet.read_table(path, columns=[TEXT_COLUMN])[TEXT_COLUMN].to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} cannot be read as parquet ({reason}); get the file again") from None
    if not all(value is None or isinstance(value, str) for value in column):
        raise UserError(f"{path} has a column {TEXT_COLUMN} that holds no strings; expected one text per row")
    return tuple(value or "" for value in column)


def read_dataset(source: str, split: str) -> tuple[tuple[Document, ...], str]:
    """Read the data set NAME, NAME:SPLIT or NAME:CONFIG:SPLIT: (documents, description).

    NAME is a name on the hub or a local folder. Rows are streamed until MAX_DATASET_CHARACTERS is reached; the
    description says so if that leaves out rows. `split` is used if `source` does not name a split. Raises UserError if
    the data set, its split or its text column is not available.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name, *rest = source.split(":")
    if not name or len(rest) > 2 or not all(rest):
        raise UserError(f"--text {source}: expected a file, NAME, NAME:SPLIT or NAME:CONFIG:SPLIT of a data set")
    split = rest[-1] if rest else split
    config = rest[0] if len(rest) == 2 else None
    try:
        rows = load_dataset(name, config, split=split, streaming=True)
        documents, cut = _take(rows, source)
    except (DatasetsError, OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        what = f"--text {source}: there is no such file, and no data set can be loaded by that name ({reason})"
        raise UserError(
            f"{what}; give a .txt, .jsonl or .parquet file, or check the name and the connection"
        ) from error
    part = f", its first {len(documents)} rows" if cut else ""
    return documents, f"data set {name}{f' ({config})' if config else ''}, split {split}{part}"


def _take(rows: Iterator[Mapping[str, Any]], source: str) -> tuple[tuple[Document, ...], bool]:
    """Take documents from `rows` up to MAX_DATASET_CHARACTERS: (documents, whether the limit was reached)."""
    documents: list[Document] = []
    characters = 0
    for number, row in enumerate(rows, start=1):
        document = _document(row, f"--text {source} row {number}")
        documents.append(document)
        characters += len(document) if isinstance(document, str) else sum(len(m["content"]) for m in document)
        if characters >= MAX_DATASET_CHARACTERS:
            return tuple(documents), True
    return tuple(documents), False
