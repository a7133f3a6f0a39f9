"""The header of a GGUF file, read with every number checked.

    "GGUF", version u32, tensor count u64, count of key-values u64
    key-values: key, type u32, value
    tensors: name, number of dimensions u32, dimensions u64 (columns first), type u32, offset u64 in the data
    padding to general.alignment, then the data; every tensor starts at a multiple of general.alignment

All numbers are little endian; a string is its length in bytes as u64, then UTF-8. The key-values are kept as bytes and
only the scalars and strings among them are read, so that a file made from another keeps all of them unchanged.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from reallm.errors import UserError

from .types import BLOCKS

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT_KEY = "general.alignment"
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
Value = int | float | bool | str


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a GGUF file."""

    name: str
    shape: tuple[int, ...]
    """Rows first, as in torch; the file has the reverse order."""
    type_id: int
    start: int
    """Position of the first byte in the file."""

    @property
    def nbytes(self) -> int:
        """Bytes of the data, without padding."""
        _, elements, block_bytes = BLOCKS[self.type_id]
        return prod(self.shape) // elements * block_bytes


@dataclass(frozen=True)
class GgufHeader:
    """What the header of the file `path` says."""

    path: Path
    version: int
    pair_count: int
    pairs: bytes
    """The key-values, as they are in the file."""
    values: Mapping[str, Value]
    """The key-values that are scalars or strings."""
    tensors: tuple[GgufTensor, ...]
    """In the order of the header."""

    @property
    def alignment(self) -> int:
        """What the start of every tensor is a multiple of, in bytes."""
        return int(self.values.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT))


class _Cursor:
    """Reads numbers and strings one after another. Raises struct.error at the end of the data."""

    def __init__(self, data: mmap.mmap, position: int) -> None:
        self.data, self.position = data, position

    def number(self, code: str) -> Value:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.position)
        self.position += struct.calcsize(f"<{code}")
        return value  # type: ignore[no-any-return]  # unpack_from returns Any

    def count(self, code: str = "Q") -> int:
        return int(self.number(code))

    def skip(self, nbytes: int) -> bytes:
        if self.position + nbytes > len(self.data):
            raise struct.error("the file ends inside its header")
        self.position += nbytes
        return self.data[self.position - nbytes : self.position]

    def string(self) -> str:
        return self.skip(self.count()).decode()

    def value(self, kind: int) -> Value | None:
        """The value of type `kind`; None for an array, which is skipped."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.number(_SCALARS[kind])
        element, count = self.count("I"), self.count()
        if element in _SCALARS:
            self.skip(count * struct.calcsize(f"<{_SCALARS[element]}"))
            return None
        for _ in range(count):
            self.value(element)
        return None


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header of the file `path`. Raises UserError if it is not a GGUF file, is cut short or cannot be used."""
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] != MAGIC:
                raise UserError(f"{path} is not a GGUF file: it does not begin with GGUF; give the model's .gguf file")
            return _read(path, data)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the model's .gguf file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; give the model's .gguf file") from None
    except (struct.error, KeyError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}); copy or download it again") from None


def _read(path: Path, data: mmap.mmap) -> GgufHeader:
    cursor = _Cursor(data, len(MAGIC))
    version = cursor.count("I")
    if version not in VERSIONS:
        raise UserError(f"{path} is GGUF version {version}; expected version 2 or 3, little endian; convert it again")
    tensor_count, pair_count = cursor.count(), cursor.count()
    first, values = cursor.position, {}
    for _ in range(pair_count):
        key = cursor.string()
        if (value := cursor.value(cursor.count("I"))) is not None:
            values[key] = value
    pairs = data[first : cursor.position]
    alignment = values.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"{ALIGNMENT_KEY} is {alignment!r}, expected a power of two")
    entries = [_entry(cursor) for _ in range(tensor_count)]
    data_start = -(-cursor.position // alignment) * alignment
    tensors = tuple(GgufTensor(t.name, t.shape, t.type_id, t.start + data_start) for t in entries)
    _check(path, tensors, len(data), alignment)
    return GgufHeader(path, version, pair_count, pairs, values, tensors)


def _entry(cursor: _Cursor) -> GgufTensor:
    name, dimensions = cursor.string(), cursor.count("I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
    shape = tuple(cursor.count() for _ in range(dimensions))[::-1]
    return GgufTensor(name, shape, cursor.count("I"), cursor.count())


def _check(path: Path, tensors: tuple[GgufTensor, ...], file_bytes: int, alignment: int) -> None:
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise ValueError("a tensor is listed twice")
    for tensor in tensors:
        if tensor.type_id not in BLOCKS:
            raise UserError(
                f"{path}: tensor {tensor.name} has type {tensor.type_id}, whose size is not known; "
                "convert the model to F16 or BF16"
            )
        if tensor.shape[-1] % BLOCKS[tensor.type_id][1] or tensor.start % alignment:
            raise ValueError(f"tensor {tensor.name} is not made of whole blocks or is not aligned")
        if tensor.start + tensor.nbytes > file_bytes:
            raise ValueError(f"tensor {tensor.name} ends behind the end of the file")
