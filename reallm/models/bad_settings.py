"""Finding the key of a settings file that transformers cannot use.

Each file is tried alone, then without one key after another, until it can be used. config.json is tried by building the
model without memory for its weights.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel

from reallm.kernels.storage.layout import CONFIG_FILE

from .checkpoint import read_checkpoint
from .model_class import model_class
from .sentence_encoder import encoder_class

Key = tuple[str, ...]
"""A key of a JSON object, after those of the objects around it."""
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILE = "tokenizer_config.json"
_GENERATION_TYPES: Mapping[type, tuple[str, ...]] = {
    bool: (
        *("do_sample", "use_cache", "output_scores", "output_logits", "output_attentions", "output_hidden_states"),
        *("return_dict_in_generate", "renormalize_logits", "remove_invalid_values"),
    ),
    int: (
        *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "num_return_sequences"),
        *("top_k", "no_repeat_ngram_size"),
    ),
    float: ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty", "max_time"),
}
"""Type -> settings of generation_config.json that have it, unless they are null."""
_MAX_TRIALS = 100
_MAX_FILE_BYTES = 1 << 26
"""Larger files are not settings."""


@dataclass(frozen=True)
class BadSetting:
    """What makes a file unusable."""

    file: str
    key: Key
    error: Exception
    """What using the file raises."""


def find_bad_setting(folder: Path) -> BadSetting | None:
    """The first of the three files in `folder` that cannot be used, with the key.

    None if all of them can be used, or no single key makes the difference.
    """
    for file, attempt in _ATTEMPTS.items():
        if (folder / file).is_file() and (error := _failure(attempt, folder)) is not None:
            key = _find_key(folder, file, attempt, error)
            return BadSetting(file, key, error) if key else None
    return None


def wrong_shape(folder: Path) -> str:
    """One line about the first tensor whose stored shape is not that of the model in config.json; "" if all fit.

    It names the keys of config.json that have the wrong number.
    """
    try:
        expected = {name: tuple(tensor.shape) for name, tensor in _build(folder).state_dict().items()}
        stored = {name: tensor.shape for name, tensor in read_checkpoint(folder).items()}
    except Exception:  # noqa: BLE001 - the error that is being explained is reported instead
        return ""
    for name, shape in stored.items():
        if name in expected and expected[name] != shape:
            wrong = set(expected[name]) - set(shape)
            values = read_values(folder / CONFIG_FILE)
            keys = [f"{'.'.join(key)} = {value_at(values, key)}" for key in keys_of(values) if _in(values, key, wrong)]
            by = f" ({', '.join(keys)})" if keys else ""
            return f"the stored tensor {name} is {list(shape)}, by config.json{by} it is {list(expected[name])}"
    return ""


def check_tokenizer(tokenizer: Any) -> None:
    """Raise an exception if a setting of `tokenizer` is of a wrong type, which otherwise shows at its first use."""
    limit = tokenizer.model_max_length
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit >= 1:
        raise ValueError(f"model_max_length is {limit!r}, expected a number above 0")
    ids = tokenizer("a b")["input_ids"]
    tokenizer.decode(ids)
    tokenizer.decode(ids, skip_special_tokens=True)
    if tokenizer.chat_template is not None and not isinstance(tokenizer.chat_template, str | dict):
        raise ValueError(f"chat_template is a {type(tokenizer.chat_template).__name__}, expected text")


def check_generation(config: GenerationConfig) -> None:
    """Raise an exception if a setting of `config` is of a wrong type, which otherwise shows while generating."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        value = getattr(config, name, None)
        ids = value if isinstance(value, list) else [value]
        if value is not None and not all(type(token) is int for token in ids):
            raise ValueError(f"field '{name}' is {value!r}, expected a token id or a list of them")
    for kind, names in _GENERATION_TYPES.items():
        for name in names:
            value = getattr(config, name, None)
            fits = type(value) is kind or (kind is float and type(value) is int)
            if value is not None and not fits:
                raise ValueError(f"field '{name}' is {value!r}, expected a value of type {kind.__name__}")


def read_values(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def keys_of(values: Mapping[str, Any], outer: Key = ()) -> Iterator[Key]:
    """All keys of `values` and of the objects in it.

    >>> list(keys_of({"a": 1, "b": {"c": 2}}))
    [('a',), ('b',), ('b', 'c')]
    """
    for key, value in values.items():
        yield (*outer, key)
        if isinstance(value, Mapping):
            yield from keys_of(value, (*outer, key))


def value_at(values: Mapping[str, Any], key: Key) -> object:
    """What `values` holds at `key`; None if it has no such key."""
    value: object = values
    for name in key:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _in(values: Mapping[str, Any], key: Key, numbers: set[int]) -> bool:
    value = value_at(values, key)
    return isinstance(value, int) and not isinstance(value, bool) and value in numbers


def _build(folder: Path) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    kind, config = model_class(config, str(folder), encoder_class(config, folder))
    with torch.device("meta"):
        return kind(config)


def _use_generation_config(folder: Path) -> None:
    check_generation(GenerationConfig.from_pretrained(folder, local_files_only=True))


def _use_tokenizer(folder: Path) -> None:
    check_tokenizer(AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True))


_ATTEMPTS: Mapping[str, Callable[[Path], object]] = {
    CONFIG_FILE: _build,
    GENERATION_FILE: _use_generation_config,
    TOKENIZER_FILE: _use_tokenizer,
}
"""File -> what fails if it cannot be used."""


def _failure(attempt: Callable[[Path], object], folder: Path) -> Exception | None:
    try:
        attempt(folder)
    except Exception as error:  # noqa: BLE001 - transformers and its parts raise exceptions of any class
        return error
    return None


def _find_key(folder: Path, file: str, attempt: Callable[[Path], object], error: Exception) -> Key:
    """The key of `file` that causes `error`: one that the message names as a field, or one without which it is gone."""
    values = read_values(folder / file)
    named = re.search(r"field '(\w+)'", str(error), re.IGNORECASE)
    if named and (matching := [key for key in keys_of(values) if key[-1] == named[1]]):
        return matching[0]
    with tempfile.TemporaryDirectory() as name:
        trial = Path(name)
        for path in folder.iterdir():
            if path.is_file() and path.name != file and path.stat().st_size < _MAX_FILE_BYTES:
                (trial / path.name).symlink_to(path.resolve())

        def works(changed: Mapping[str, Any]) -> bool:
            (trial / file).write_text(json.dumps(changed), encoding="utf-8")
            return _failure(attempt, trial) is None

        return _narrow_down(values, str(error), works)


def _narrow_down(values: Mapping[str, Any], message: str, works: Callable[[Mapping[str, Any]], bool]) -> Key:
    """The innermost key without which the file works, or with 1 in place of its number; () if there is none.

    Keys that `message` has are tried first.
    """
    found: Key = ()
    inner: object = values
    while isinstance(inner, Mapping):
        keys = sorted(inner, key=lambda key: not re.search(rf"\b{re.escape(key)}\b", message))[:_MAX_TRIALS]
        step = next((key for key in keys if works(_changed(values, (*found, key)))), None)
        if step is None:
            numbers = [key for key in keys if isinstance(inner[key], int) and inner[key] != 1]
            step = next((key for key in numbers if works(_changed(values, (*found, key), 1))), None)
        if step is None:
            break
        found, inner = (*found, step), inner[step]
    return found


def _changed(values: Mapping[str, Any], key: Key, value: object = None) -> dict[str, Any]:
    """A copy of `values` with `value` at `key`, or without that key if it is None."""
    result, first = dict(values), key[0]
    if len(key) > 1:
        result[first] = _changed(values[first], key[1:], value)
    elif value is None:
        del result[first]
    else:
        result[first] = value
    return result
