"""Text to calibrate on and to evaluate on: documents from a file, a data set, or Python's own documentation."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reallm.errors import UserError

from .offline import offline_documents
from .readers import Document, read_dataset, read_jsonl, read_parquet, read_text_file

READERS = {".txt": read_text_file, ".jsonl": read_jsonl, ".parquet": read_parquet}
Split = Literal["train", "test"]


@dataclass(frozen=True)
class Text:
    """Documents and a description of their source."""

    documents: tuple[Document, ...]
    description: str
    """The source in one line, for messages and records."""
    sha256: str
    """Digest of the documents; it does not depend on the path that they were read from."""
    is_fallback: bool = False
    """Whether this is the offline default; if so, every report must say so."""


def load_text(source: str | Path | None, split: Split = "train") -> Text:
    """Read `source`: a .txt file (one document), a .jsonl or .parquet file, or a data set of the `datasets` library.

    A data set is written NAME, NAME:SPLIT or NAME:CONFIG:SPLIT, e.g. Salesforce/wikitext:wikitext-2-raw-v1:train;
    `split` is used if `source` does not name a split. Files are read in full. With `source` None, the text is English
    prose from Python's own documentation (the offline default), whose "train" and "test" splits share no paragraph.
    Raises UserError, with a message of one line, for a source that is missing, empty or not in the expected form.
    """
    documents: tuple[Document, ...]
    if source is None:
        documents, description = offline_documents(split)
    else:
        documents, description = _read(source, split)
    if not any(document if isinstance(document, tuple) else document.strip() for document in documents):
        raise UserError(f"{source} holds no text; expected at least one window of it: give another --text")
    canonical = json.dumps(documents, ensure_ascii=True, sort_keys=True)
    return Text(documents, description, hashlib.sha256(canonical.encode()).hexdigest(), source is None)


def _read(source: str | Path, split: str) -> tuple[tuple[Document, ...], str]:
    """The documents of a file or a data set, and a description of them."""
    path = Path(source).expanduser()
    reader = READERS.get(path.suffix)
    if path.is_file():
        if reader is None:
            raise UserError(f"{source} ends in {path.suffix or 'nothing'}; expected {', '.join(READERS)}: convert it")
        return reader(path), str(source)
    folder = Path(str(source).partition(":")[0])
    looks_local = reader is not None or path.is_absolute() or str(source).startswith((".", "~")) or len(path.parts) > 2
    if looks_local and not folder.is_dir():
        raise UserError(f"{source} does not exist; give another --text, or leave it out for the offline default")
    return read_dataset(str(source), split)
