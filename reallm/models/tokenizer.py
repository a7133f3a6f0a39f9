"""Loading the tokenizer stored with a model, and checking that it is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .setting_types import TOKENIZER_FILE, check_tokenizer
from .settings_errors import settings_errors
from .source import Source

_WHOLE_FILES = ("tokenizer.json", "tekken.json")
"""Files that hold a whole tokenizer each."""
_PARTS = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
"""Files that hold the vocabulary of a tokenizer."""


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer stored with the model; None if there is none. Raises UserError if it is damaged."""
    options: dict[str, Any] = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    names = (*_WHOLE_FILES, *_PARTS, TOKENIZER_FILE)
    if not source.gguf_file and not any((source.folder / name).is_file() for name in names):
        return None
    folder = None if source.gguf_file else source.folder
    with settings_errors(folder, f"the tokenizer of {source.label} cannot be loaded"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.folder, trust_remote_code=False, local_files_only=True, **options
        )
        check_tokenizer(tokenizer)
        if folder is not None:
            _check_vocabulary(tokenizer, folder)
    return tokenizer


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raise ValueError if the vocabulary is missing: transformers then makes a tokenizer with none."""
    if any((folder / name).is_file() for name in _WHOLE_FILES):
        return
    names = tokenizer.vocab_files_names
    added = set(tokenizer.get_added_vocab())
    if names and len(set(tokenizer.get_vocab()) - added) < 2:
        raise ValueError(f"its vocabulary is empty, {' or '.join(names.values())} is missing; get it too")
