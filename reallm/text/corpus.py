"""Text to calibrate on and to evaluate on: documents from a file, a data set, or Python's own documentation."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reallm.errors import UserError

from .documents import Conversation, Document
from .offline import offline_documents
from .readers import ReadDocuments, read_dataset, read_jsonl, read_parquet, read_text_file

LOG = logging.getLogger(__name__)
READERS = {".txt": read_text_file, ".jsonl": read_jsonl, ".parquet": read_parquet}
MAX_SHOWN = 60
"""Characters of an unusable path that a message shows."""
SELF = "self"
"""The name, as a value of --text, of the text that the model to be calibrated writes itself."""
PYTHON = "python"
"""The name, as a value of --text, of Python's documentation, which is also read where no text is named."""
GENERAL = "allenai/c4:en:train"
"""The data set that `general_text` reads: web pages in English (C4, arXiv 1910.10683)."""
TIMEOUT_SECONDS = 5.0
"""How long the hub may take to say that it has GENERAL."""
CHARACTERS_PER_TOKEN = 16
"""Characters of GENERAL that are read for every token that is needed; windows are sampled from them."""
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
    """Whether this is Python's documentation; if so, every report must say so."""
    places: tuple[str, ...] = ()
    """Where each document stands in its source, for error messages; empty if only the description is known."""

    def place(self, index: int) -> str:
        """Where document `index` stands: the file with a line or row number, or else the description of the text."""
        return self.places[index] if self.places else f"{self.description}, document {index + 1}"


def load_text(source: str | Path | None, split: Split = "train") -> Text:
    """Read `source`: a .txt file (one document), a .jsonl or .parquet file, or a data set of the `datasets` library.

    A data set is written NAME, NAME:SPLIT or NAME:CONFIG:SPLIT, e.g. Salesforce/wikitext:wikitext-2-raw-v1:train;
    `split` is used if `source` does not name a split. Files are read in full. With `source` None or PYTHON, the text is
    English prose from Python's own documentation, whose "train" and "test" splits share no paragraph.
    Raises UserError, with a message of one line, for a source that is missing, empty or not in the expected form.
    """
    if source == SELF:
        raise UserError(
            f"--text {SELF} is the text that a model writes to be calibrated on, in `measure` and `compress`; "
            f"give a file or a data set here (a folder of that name: ./{SELF})"
        )
    documents: tuple[Document, ...]
    places: tuple[str, ...] = ()
    if source is None or source == PYTHON:
        documents, description = offline_documents(split)
    else:
        (documents, places), description = _read(source, split)
    if not any(not isinstance(document, str) or document.strip() for document in documents):
        raise UserError(f"{source} holds no text; expected at least one window of it: give another --text")
    if media := sum(isinstance(document, Conversation) and document.has_media for document in documents):
        LOG.warning(
            "%s: %d conversations have images, sound or the like, which are not read: the model sees only what the "
            "chat template writes in their place",
            description,
            media,
        )
    return Text(documents, description, _digest(documents), source is None or source == PYTHON, places)


def general_text(tokens: int) -> Text:
    """The first documents of GENERAL, streamed from the hub: several times the length of `tokens` tokens.

    Raises UserError if the hub does not answer within TIMEOUT_SECONDS, or does not give the text.
    """
    from huggingface_hub import HfApi

    name = GENERAL.partition(":")[0]
    try:
        HfApi().dataset_info(name, timeout=TIMEOUT_SECONDS)  # `datasets` would try again for half a minute
    except Exception as error:  # the network client raises its own kinds
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"the hub does not give {name}: {reason}") from error
    (documents, places), description = read_dataset(GENERAL, "train", CHARACTERS_PER_TOKEN * tokens)
    return Text(documents, description, _digest(documents), places=places)


def _digest(documents: tuple[Document, ...]) -> str:
    """sha256 of the documents as JSON."""
    values = [document.to_json() if isinstance(document, Conversation) else document for document in documents]
    canonical = json.dumps(values, ensure_ascii=True, sort_keys=True, default=str)  # a table may hold dates
    return hashlib.sha256(canonical.encode()).hexdigest()


def _read(source: str | Path, split: str) -> tuple[ReadDocuments, str]:
    """The documents of a file or a data set, and a description of them."""
    try:
        path = Path(source).expanduser()
        is_file = path.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long, such as a text; a home that is not known
        name = str(source)
        shown = name if len(name) <= MAX_SHOWN else name[:MAX_SHOWN] + "..."
        raise UserError(f"--text {shown}: cannot be read ({error.args[-1]}); expected the path of a file") from None
    reader = READERS.get(path.suffix)
    if is_file:
        if reader is None:
            raise UserError(f"{source} ends in {path.suffix or 'nothing'}; expected {', '.join(READERS)}: convert it")
        return reader(path), str(source)
    folder = Path(str(source).partition(":")[0])
    looks_local = reader is not None or path.is_absolute() or str(source).startswith((".", "~")) or len(path.parts) > 2
    if looks_local and not folder.is_dir():
        raise UserError(f"{source} does not exist; give another --text, or leave it out for the offline default")
    return read_dataset(str(source), split)
