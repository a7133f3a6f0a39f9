"""GGUF files: reading the header, and writing a copy with other tensors (ggml's docs/gguf.md).

A file is a magic number, a version, counts, key-value pairs, one entry for every tensor, and the tensors' bytes, each
at a multiple of the alignment.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reallm.errors import UserError

MAGIC, ALIGNMENT = b"GGUF", 32
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 30: (1, 2)}
"""Type -> (weights, bytes) of a block, of the types whose sizes are not taken from the gaps between tensors."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file."""

    name: str
    shape: tuple[int, ...]
    """Fastest dimension first, as GGUF stores it."""
    type: int
    start: int
    """Position of its first byte in the file."""
    nbytes: int
    """Its bytes, with padding where the type's size is not in BLOCKS."""


@dataclass(frozen=True)
class GgufFile:
    """The header of a file."""

    path: Path
    version: int
    pairs: bytes
    """The key-value pairs as stored."""
    pair_count: int
    values: Mapping[str, int | float | bool | str]
    """Key -> value of every pair that is not an array."""
    tensors: tuple[Tensor, ...]

    @property
    def alignment(self) -> int:
        """What the positions of tensors are multiples of."""
        return int(self.values.get("general.alignment", ALIGNMENT))

    def bytes_of(self, tensor: Tensor) -> NDArray[np.uint8]:
        """The bytes of a tensor, mapped from the file."""
        return np.memmap(self.path, dtype=np.uint8, mode="r", offset=tensor.start, shape=(tensor.nbytes,))


class _Cursor:
    def __init__(self, data: NDArray[np.uint8]) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if count < 0 or self.at + count > len(self.data):
            raise ValueError("it ends too early")
        self.at += count
        return self.data[self.at - count : self.at].tobytes()

    def number(self, code: str) -> int:
        return int(struct.unpack(code, self.take(struct.calcsize(code)))[0])

    def text(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8", "replace")

    def value(self, kind: int) -> int | float | bool | str | None:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            value: int | float | bool = struct.unpack(_FORMATS[kind], self.take(_SIZES[kind]))[0]
            return value
        inner, count = self.number("<I"), self.number("<Q")
        if inner in _SIZES:
            self.take(_SIZES[inner] * count)
        else:
            for _ in range(count):
                self.value(inner)
        return None


def read_gguf(path: Path) -> GgufFile:
    """The header of the GGUF file `path`. Raises UserError for a file that cannot be read."""
    try:
        size = path.stat().st_size
        cursor = _Cursor(np.memmap(path, dtype=np.uint8, mode="r"))
        if cursor.take(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version, tensor_count, pair_count = cursor.number("<I"), cursor.number("<Q"), cursor.number("<Q")
        if version not in (2, 3):
            raise ValueError(f"it has version {version}, expected 2 or 3")
        start, values = cursor.at, {}
        for _ in range(pair_count):
            key = cursor.text()
            if (value := cursor.value(cursor.number("<I"))) is not None:
                values[key] = value
        pairs = cursor.data[start : cursor.at].tobytes()
        entries = []
        for _ in range(tensor_count):
            name, dims = cursor.text(), cursor.number("<I")
            shape = tuple(cursor.number("<Q") for _ in range(dims))
            entries.append((name, shape, cursor.number("<I"), cursor.number("<Q")))
        alignment = int(values.get("general.alignment", ALIGNMENT))
        data = -(-cursor.at // alignment) * alignment
        ends = dict(zip(sorted(e[3] for e in entries), [*sorted(e[3] for e in entries)[1:], size - data], strict=True))
        tensors = tuple(_tensor(entry, data, ends[entry[3]]) for entry in entries)
        if any(t.start + t.nbytes > size for t in tensors):
            raise ValueError("it is truncated")
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise UserError(f"{path} cannot be read as a GGUF file: {error}; get the file again") from None
    return GgufFile(path, version, pairs, pair_count, values, tensors)


def _tensor(entry: tuple[str, tuple[int, ...], int, int], data: int, end: int) -> Tensor:
    name, shape, kind, offset = entry
    count, block = int(np.prod(shape, dtype=np.int64)), BLOCKS.get(kind)
    nbytes = end - offset if block is None else count // block[0] * block[1]
    return Tensor(name, shape, kind, data + offset, nbytes)


def write_copy(
    base: GgufFile, path: Path, types: Mapping[str, int], blocks: Callable[[str], NDArray[np.uint8]]
) -> None:
    """Write a copy of `base` to `path` in which the tensors that are keys of `types` have other types and bytes.

    `blocks(name)` gives their bytes. Everything else is copied byte for byte.
    """
    entries, offset = b"", 0
    for tensor in base.tensors:
        kind = types.get(tensor.name, tensor.type)
        nbytes = tensor.nbytes
        if tensor.name in types:
            weights, size = BLOCKS[kind]
            nbytes = int(np.prod(tensor.shape, dtype=np.int64)) // weights * size
        encoded = tensor.name.encode()
        entries += struct.pack(f"<Q{len(encoded)}sI", len(encoded), encoded, len(tensor.shape))
        entries += struct.pack(f"<{len(tensor.shape)}QIQ", *tensor.shape, kind, offset)
        offset += -(-nbytes // base.alignment) * base.alignment
    with path.open("wb") as stream:
        stream.write(MAGIC + struct.pack("<IQQ", base.version, len(base.tensors), base.pair_count))
        stream.write(base.pairs + entries)
        stream.write(b"\0" * (-stream.tell() % base.alignment))
        for tensor in base.tensors:
            stream.write((blocks(tensor.name) if tensor.name in types else base.bytes_of(tensor)).tobytes())
            stream.write(b"\0" * (-stream.tell() % base.alignment))
        stream.flush()
        os.fsync(stream.fileno())
