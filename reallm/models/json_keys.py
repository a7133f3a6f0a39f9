"""Reading and changing values of JSON objects by their keys, at any depth."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Key = tuple[str, ...]
"""A key of a JSON object, after those of the objects around it."""


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


def with_changed(values: Mapping[str, Any], key: Key, value: object = None) -> dict[str, Any]:
    """A copy of `values` with `value` at `key`, or without that key if it is None."""
    result, first = dict(values), key[0]
    if len(key) > 1:
        result[first] = with_changed(values[first], key[1:], value)
    elif value is None:
        del result[first]
    else:
        result[first] = value
    return result
