"""Finding the key of a settings file that transformers cannot use.

Each file is tried alone, then without one key after another, until it can be used. config.json is tried by building the
model without memory for its weights.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel

from reallm.errors import raised_by_library
from reallm.kernels.storage.layout import CONFIG_FILE

from .checkpoint import read_checkpoint
from .json_keys import Key, keys_of, read_values, value_at, with_changed
from .model_class import model_class
from .sentence_encoder import encoder_class
from .setting_types import GENERATION_FILE, TOKENIZER_FILE, check_generation, check_tokenizer

_MAX_TRIALS = 100
_MAX_FILE_BYTES = 1 << 26
"""Larger files are not settings."""


@dataclass(frozen=True)
class BadSetting:
    """The reason why a file cannot be used."""

    file: str
    key: Key
    error: BaseException
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


def _failure(attempt: Callable[[Path], object], folder: Path) -> BaseException | None:
    try:
        attempt(folder)
    except BaseException as error:  # transformers and its parts raise exceptions of any class
        if not raised_by_library(error):
            raise
        return error
    return None


def _find_key(folder: Path, file: str, attempt: Callable[[Path], object], error: BaseException) -> Key:
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
        step = next((key for key in keys if works(with_changed(values, (*found, key)))), None)
        if step is None:
            numbers = [key for key in keys if isinstance(inner[key], int) and inner[key] != 1]
            step = next((key for key in numbers if works(with_changed(values, (*found, key), 1))), None)
        if step is None:
            break
        found, inner = (*found, step), inner[step]
    return found
