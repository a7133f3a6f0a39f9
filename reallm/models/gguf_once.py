"""Reading the header of a GGUF file once.

For one model, transformers reads the file's header three times (configuration, weights, tokenizer), each time with
every string of the vocabulary, and makes the table of tensor names again for every module. Within `read_gguf_once`
each header is read once and each table is made once.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
_REPEATED = ("GGUFReader", "get_tensor_name_map")
"""What transformers calls again with the same arguments, and only reads; it looks both up in `gguf` at each call."""


@contextmanager
def read_gguf_once() -> Iterator[None]:
    """Remember what the package gguf returns; it is forgotten when the context ends."""
    import gguf  # a model in another format does not need it

    originals = {name: getattr(gguf, name) for name in _REPEATED}
    for name, original in originals.items():
        setattr(gguf, name, cache(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)


def reading_gguf_once(
    load: Callable[Concatenate[str | Path, P], R],
) -> Callable[Concatenate[str | Path, P], R]:
    """`load`, a function of a model's path, within `read_gguf_once` if that path is one of a GGUF file."""

    @wraps(load)
    def loading(source: str | Path, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if Path(source).suffix != ".gguf" or importlib.util.find_spec("gguf") is None:
            return load(source, *args, **kwargs)
        with read_gguf_once():
            return load(source, *args, **kwargs)

    return loading
