"""One line for a bad value in config.json, generation_config.json or tokenizer_config.json, with the file and the key.

transformers raises whatever the first use of the value raises, often without its name. `bad_settings` finds the key.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reallm.errors import ReallmError, UserError, raised_by_library
from reallm.kernels.storage.layout import CONFIG_FILE

from .bad_settings import find_bad_setting, wrong_shape
from .checkpoint import read_checkpoint
from .json_keys import Key, keys_of, read_values, value_at

_MAX_REASON, _MAX_VALUE = 240, 60
_NAMES = ("dtype", "torch_dtype", "model_type", "transformers_weights")
"""Keys that are read before the model is built."""
_FEW_PARTS = 1000
"""Building a model with as many layers or experts takes seconds."""


@contextmanager
def settings_errors(folder: Path | None, what: str) -> Iterator[None]:
    """Turn every exception inside, which loads something from `folder`, into a UserError of one line.

    It names the settings file and the key that cause it. Where none does, or without a folder, it says that `what`
    failed, and why.

    >>> with settings_errors(folder, "the tokenizer cannot be loaded"):
    ...     tokenizer = AutoTokenizer.from_pretrained(folder)
    """
    try:
        yield
    except ReallmError:
        raise
    except BaseException as error:  # transformers and its parts raise exceptions of any class, and bare ones
        if not raised_by_library(error):
            raise
        found = None if folder is None else find_bad_setting(folder)
        if folder is None or found is None:
            reason = (folder and wrong_shape(folder)) or _reason(error)
            raise UserError(f"{what}: {reason}") from error
        raise UserError(_bad_value(folder, found.file, found.key, _reason(found.error))) from error


def check_config(folder: Path) -> None:
    """Raise UserError for values of config.json that `bad_settings` cannot find.

    These are NaN, names that are not text, and more layers or experts than the weights files can hold: building a
    model takes time in proportion to them before its first tensor is read.
    """
    values = read_values(folder / CONFIG_FILE)
    tensors = read_checkpoint(folder).values()
    most = max((_FEW_PARTS, len(tensors), *(size for tensor in tensors for size in tensor.shape)))
    for key in keys_of(values):
        value = value_at(values, key)
        if isinstance(value, float) and math.isnan(value):
            raise UserError(_bad_value(folder, CONFIG_FILE, key, "it is not a number"))
        if key[-1] in _NAMES and not isinstance(value, str | None):
            raise UserError(_bad_value(folder, CONFIG_FILE, key, "expected a name"))
        counts = re.search(r"(layers?|depth|blocks|experts)$", key[-1])
        if counts and isinstance(value, int) and not isinstance(value, bool) and value > most:
            reason = f"the weights files have {len(tensors)} tensors and no dimension above {most}"
            raise UserError(_bad_value(folder, CONFIG_FILE, key, reason))


def _reason(error: BaseException) -> str:
    """The message of an exception in one line: its first one, or the next where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and "alidation error" in lines[0]:
        lines = lines[1:]
    text = re.sub(r"^\w*(Error|Exception): ", "", lines[0]) if lines else ""
    if "ignore_mismatched_sizes" in text:
        text = "stored tensors have other shapes than config.json gives them"
    if " " not in text:  # a KeyError's message is only the key
        text = f"{type(error).__name__} {text}".strip()
    return _short(text.rstrip(".:;"), _MAX_REASON)


def _bad_value(folder: Path, file: str, key: Key, reason: str) -> str:
    value = _short(repr(value_at(read_values(folder / file), key)), _MAX_VALUE)
    return f"{folder / file}: {'.'.join(key)} = {value} cannot be used ({reason}); correct it or get the file again"


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
