"""Text to calibrate on and to evaluate on, and the token windows cut from it.

Evaluation: the documents joined by blank lines, tokenised once, consecutive windows that do not overlap, the last
partial one dropped (the usual WikiText-2 protocol; GPTQ, arXiv 2210.17323). Calibration: `nsamples` windows drawn with
a seed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reallm.errors import UserError

from .offline import offline_documents
from .readers import Document, read_dataset, read_jsonl, read_parquet, read_text_file

READERS = {".txt": read_text_file, ".jsonl": read_jsonl, ".parquet": read_parquet}
NO_LIMIT = 10**9  # tokenizers without a longest input give 10^30 or so
Split = Literal["train", "test"]


@dataclass(frozen=True)
class Text:
    """Documents and where they came from."""

    documents: tuple[Document, ...]
    description: str
    """One line for the user and the records."""
    sha256: str
    """Of the documents, wherever they lie."""
    is_fallback: bool = False
    """Whether it is the offline default, which every report must say."""


def load_text(source: str | Path | None, split: Split = "train") -> Text:
    """Read `source`: a .txt file (one document), a .jsonl or .parquet file, or a data set of the `datasets` library.

    A data set is written NAME, NAME:SPLIT or NAME:CONFIG:SPLIT, e.g. Salesforce/wikitext:wikitext-2-raw-v1:train. None
    takes English text that Python itself carries; of that, `split` "train" and "test" share nothing. `split` is also
    the data set's split where `source` names none; files are taken whole. Raises UserError, one line, for whatever is
    missing, empty or of another form.
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
    path = Path(source).expanduser()
    reader = READERS.get(path.suffix)
    if path.is_file():
        if reader is None:
            raise UserError(f"{source} ends in {path.suffix or 'nothing'}; expected {', '.join(READERS)}: convert it")
        return reader(path), str(source)
    folder = Path(str(source).partition(":")[0])
    looks_local = reader is not None or path.is_absolute() or str(source).startswith((".", "~")) or len(path.parts) > 2
    if looks_local and not folder.is_dir():
        raise UserError(f"{source} does not exist; give another --text, or none for the offline default")
    return read_dataset(str(source), split)


def windows(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    nsamples: int | None,
    seqlen: int,
    seed: int = 0,
    chat_template: bool = False,
    max_positions: int | None = None,
) -> Tensor:
    """Token windows of `text` that do not overlap, int64 [windows, seqlen].

    `nsamples` None gives all consecutive ones from the start; else so many are drawn with `seed`, spread over the text
    and in its order, or fewer where the text is short (say so with `shortage`). `chat_template` wraps each plain
    document as a user's message; conversations always go through the template. `max_positions` is the model's longest
    context (the tokenizer's if None). Raises UserError for a text shorter than one window and a seqlen out of range.
    """
    limit = max_positions or tokenizer.model_max_length or NO_LIMIT
    if not 1 <= seqlen <= limit:
        raise UserError(f"--seqlen {seqlen}: this model takes 1 to {limit} tokens; choose a length within that")
    if nsamples is not None and nsamples < 1:
        raise UserError(f"--nsamples {nsamples}: expected at least 1 window")
    tokens = tokenize(text, tokenizer, chat_template)
    count = len(tokens) // seqlen
    if count == 0:
        what = f"{text.description}: {len(tokens)} tokens found, {seqlen} needed for one window"
        raise UserError(f"{what}; give a longer --text or a smaller --seqlen")
    if nsamples is None:
        return tokens[: count * seqlen].reshape(count, seqlen)
    count = min(count, nsamples)
    generator = torch.Generator().manual_seed(seed)
    gaps, _ = torch.randint(len(tokens) - count * seqlen + 1, (count,), generator=generator).sort()
    starts = gaps + seqlen * torch.arange(count)  # sorted gaps keep neighbours at least seqlen apart
    return tokens[starts[:, None] + torch.arange(seqlen)]


def shortage(drawn: Tensor, nsamples: int | None) -> str | None:
    """What to tell the user when `windows` gave fewer than `nsamples`, else None."""
    if nsamples is None or len(drawn) == nsamples:
        return None
    return f"the text has only {len(drawn)} windows of {drawn.shape[1]} tokens, not {nsamples}: all are used"


def tokenize(text: Text, tokenizer: PreTrainedTokenizerBase, chat_template: bool = False) -> Tensor:
    """Token ids of the whole text, int64 [tokens], with whatever the tokenizer adds at its ends, once."""
    templated = chat_template or any(isinstance(document, tuple) for document in text.documents)
    if templated and not tokenizer.chat_template:
        raise UserError(f"{text.description}: the tokenizer has no chat template; use plain text without it")
    parts = [_rendered(document, tokenizer, chat_template) for document in text.documents]
    joined = ("" if templated else "\n\n").join(parts)  # a template adds its own ends and BOS
    ids = tokenizer(joined, add_special_tokens=not templated, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _rendered(document: Document, tokenizer: PreTrainedTokenizerBase, chat_template: bool) -> str:
    if isinstance(document, str) and not chat_template:
        return document
    conversation = [{"role": "user", "content": document}] if isinstance(document, str) else list(document)
    rendered: str = tokenizer.apply_chat_template(conversation, tokenize=False)
    return rendered
