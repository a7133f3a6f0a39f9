"""Layout of weights files: safetensors whose size is known before a byte is written (`weights` writes and reads them).

A safetensors file is u64 header length (little endian), header (JSON, may end in spaces), data without holes
(https://github.com/huggingface/safetensors#format). Offsets stand in the header, so its length depends on the order of
the tensors; a planner needs sizes that add up. Therefore each tensor reserves a fixed number of header bytes,

    header_bytes(t) = aligned(len of its JSON entry with both offsets of OFFSET_DIGITS digits, and a comma)
    file_overhead   = aligned(8 + len of braces and metadata)
    file_bytes      = sum over files of file_overhead + sum over tensors of header_bytes(t) + nbytes(t)

with aligned() to 64 bytes, and the header is padded with spaces to that reserve. Data starts at a multiple of 64.
Tensors are taken in natural order of their names (block 2 before block 10), so nothing depends on the order they come
in; a shard is closed when the next one would bring its data over `max_shard_bytes`. In a shard, tensors whose size is
a multiple of 64 come first, so all of them are 64-byte aligned; the others follow, wider dtypes first, so each is
aligned to its dtype. The index of a sharded model (a small JSON file) is no weights file.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from reallm.kernels.codes.packing import ALIGN_BYTES, aligned

from ..errors import ReallmError

DTYPE_NBYTES: Mapping[str, int] = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
    **{"U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8},
}
OFFSET_DIGITS = 13
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # what the safetensors package accepts
MAX_SHARD_BYTES = 4 << 30
METADATA: Mapping[str, str] = {"format": "pt"}  # transformers refuses files without it
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class LayoutError(ReallmError, ValueError):
    """A weights file, or a list of tensors, that cannot be: names the file or tensor, what was found and expected."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, safetensors dtype and shape of one stored tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_NBYTES:
            raise LayoutError(f"tensor {self.name!r}: dtype {self.dtype!r} is none of {', '.join(DTYPE_NBYTES)}")
        if not self.name or self.name == "__metadata__" or any(n < 0 for n in self.shape):
            raise LayoutError(
                f"tensor {self.name!r} of shape {list(self.shape)}: not a name and shape that can be stored"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return prod(self.shape) * DTYPE_NBYTES[self.dtype]

    @property
    def header_bytes(self) -> int:
        """Bytes reserved in the header, whatever the offsets turn out to be."""
        widest = 10**OFFSET_DIGITS - 1
        return aligned(len(_entry(self, widest, widest)) + 1)


@dataclass(frozen=True, slots=True)
class Shard:
    """One file: its name, its tensors in file order and its exact size."""

    file: str
    tensors: tuple[TensorSpec, ...]
    header_bytes: int
    nbytes: int


def natural_key(name: str) -> tuple[tuple[str | int, ...], str]:
    """Sorts names with their numbers read as numbers."""
    return tuple(int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))), name


def _entry(spec: TensorSpec, start: int, stop: int) -> str:
    value = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [start, stop]}
    return f"{json.dumps(spec.name)}:{json.dumps(value, separators=(',', ':'))}"


def _metadata_entry(metadata: Mapping[str, str]) -> str:
    return f'"__metadata__":{json.dumps(dict(metadata), separators=(",", ":"), sort_keys=True)}'


def file_overhead(metadata: Mapping[str, str] = METADATA) -> int:
    """Bytes of a file that holds no tensor."""
    return aligned(LENGTH_BYTES + len("{}") + len(_metadata_entry(metadata)))


def max_files(data_bytes: int, max_shard_bytes: int = MAX_SHARD_BYTES) -> int:
    """The most files that tensors of `data_bytes` in all can fill: any two neighbours together exceed a shard."""
    return max(1, 2 * -(-data_bytes // max_shard_bytes) - 1)


def plan_shards(
    tensors: Sequence[TensorSpec],
    metadata: Mapping[str, str] = METADATA,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> tuple[Shard, ...]:
    """The files for `tensors`, whatever their order. Raises LayoutError on a repeated name or too large a file."""
    if twice := [name for name, count in Counter(t.name for t in tensors).items() if count > 1]:
        raise LayoutError(f"tensor {twice[0]!r} stands twice in the list")
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in sorted(tensors, key=lambda t: natural_key(t.name)):
        if groups[-1] and filled + spec.nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.nbytes
    count = len(groups)
    names = [SINGLE_FILE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    return tuple(_shard(name, group, metadata) for name, group in zip(names, groups, strict=True))


def _shard(file: str, group: list[TensorSpec], metadata: Mapping[str, str]) -> Shard:
    whole = [t for t in group if t.nbytes % ALIGN_BYTES == 0]
    odd = sorted((t for t in group if t.nbytes % ALIGN_BYTES), key=lambda t: -DTYPE_NBYTES[t.dtype])
    tensors = (*whole, *odd)
    header = file_overhead(metadata) - LENGTH_BYTES + sum(t.header_bytes for t in tensors)
    data = sum(t.nbytes for t in tensors)
    if header > MAX_HEADER_BYTES or data >= 10**OFFSET_DIGITS:
        raise LayoutError(f"{file}: {len(tensors)} tensors of {data} bytes exceed what one file holds; use more shards")
    return Shard(file, tensors, header, LENGTH_BYTES + header + data)


def file_bytes(
    tensors: Sequence[TensorSpec],
    metadata: Mapping[str, str] = METADATA,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Exact bytes of all weights files for `tensors`, headers included."""
    return sum(shard.nbytes for shard in plan_shards(tensors, metadata, max_shard_bytes))


def header_text(shard: Shard, metadata: Mapping[str, str] = METADATA) -> bytes:
    """The header of `shard`, padded with spaces to `shard.header_bytes`."""
    entries, start = [_metadata_entry(metadata)], 0
    for spec in shard.tensors:
        entries.append(_entry(spec, start, start + spec.nbytes))
        start += spec.nbytes
    text = f"{{{','.join(entries)}}}".encode()
    if len(text) > shard.header_bytes:
        raise LayoutError(f"{shard.file}: a header of {len(text)} bytes exceeds its reserve of {shard.header_bytes}")
    return text.ljust(shard.header_bytes)
