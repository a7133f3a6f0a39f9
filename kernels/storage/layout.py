"""Layout of weights files: safetensors files whose sizes are known before a byte is written.

A safetensors file consists of a u64 header length (little endian), a header (JSON, may end in spaces), and data without
holes (https://github.com/huggingface/safetensors#format). The header contains offsets, so its length depends on the
order of the tensors; a planner needs sizes that add up. Therefore each tensor reserves a fixed number of header bytes,

    header_bytes(t) = aligned(len of its JSON entry with both offsets of OFFSET_DIGITS digits, and a comma)
    file_overhead   = aligned(8 + len of braces and metadata)
    file_bytes      = sum over files of file_overhead + sum over tensors of header_bytes(t) + nbytes(t)

where aligned() rounds up to 64; spaces pad the header to the reserved length. Data starts at a multiple of 64.
Tensors are taken in the natural order of their names (block 2 before block 10), so nothing depends on the order of the
input; a shard is closed when the next tensor would bring its data over `max_shard_bytes`. Within a shard, tensors whose
size is a multiple of 64 come first, so all of them are 64-byte aligned; the others follow, wider dtypes first, so each
is aligned to its dtype. The index of a sharded model (a small JSON file) is not counted as a weights file.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from ..errors import ReallmError
from .alignment import ALIGN_BYTES, aligned
from .dtypes import SAFETENSORS_DTYPES

OFFSET_DIGITS = 13
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # what the safetensors package accepts
MAX_SHARD_BYTES = 4 << 30
METADATA: Mapping[str, str] = {"format": "reallm"}
"""Metadata of every file. transformers up to 4.57 refuses formats that it does not know; its message names this one."""
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
"""Name of the model's configuration, which every model folder holds beside the weights."""


class LayoutError(ReallmError, ValueError):
    """An invalid weights file or list of tensors. The message names it, what was found and what was expected."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, safetensors dtype and shape of one stored tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in SAFETENSORS_DTYPES:
            known = ", ".join(SAFETENSORS_DTYPES)
            raise LayoutError(f"tensor {self.name!r} has the unknown dtype {self.dtype!r}; expected one of {known}")
        storable = self.name and self.name != "__metadata__" and all(n >= 0 for n in self.shape)
        if not storable or prod(self.shape) * SAFETENSORS_DTYPES[self.dtype].bits % 8:
            raise LayoutError(
                f"tensor {self.name!r} of {self.dtype} {list(self.shape)}: not a name and shape that can be stored"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return SAFETENSORS_DTYPES[self.dtype].nbytes(prod(self.shape))

    @property
    def header_bytes(self) -> int:
        """Bytes reserved for this tensor in the header; they do not depend on its offsets."""
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
    """Sort key of a name whose runs of digits compare as numbers: "h.2" comes before "h.10"."""
    return tuple(int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))), name


def _entry(spec: TensorSpec, start: int, stop: int) -> str:
    value = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [start, stop]}
    return f"{json.dumps(spec.name)}:{json.dumps(value, separators=(',', ':'))}"


def _metadata_entry(metadata: Mapping[str, str]) -> str:
    return f'"__metadata__":{json.dumps(dict(metadata), separators=(",", ":"), sort_keys=True)}'


def file_overhead(metadata: Mapping[str, str] = METADATA) -> int:
    """Bytes of a file without tensors."""
    return aligned(LENGTH_BYTES + len("{}") + len(_metadata_entry(metadata)))


def max_files(data_bytes: int, max_shard_bytes: int = MAX_SHARD_BYTES) -> int:
    """Maximum number of files for `data_bytes` bytes of tensors: two consecutive files exceed one shard together."""
    return max(1, 2 * -(-data_bytes // max_shard_bytes) - 1)


def plan_shards(
    tensors: Sequence[TensorSpec],
    metadata: Mapping[str, str] = METADATA,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> tuple[Shard, ...]:
    """The files that hold `tensors`; the order of the input does not matter.

    Raises LayoutError for a repeated name and for a file that would be too large.
    """
    if repeated := [name for name, count in Counter(t.name for t in tensors).items() if count > 1]:
        raise LayoutError(f"tensor {repeated[0]!r} appears twice in the list")
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in sorted(tensors, key=lambda t: natural_key(t.name)):
        if groups[-1] and filled + spec.nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.nbytes
    count = len(groups)
    names = [WEIGHTS_FILE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    return tuple(_shard(name, group, metadata) for name, group in zip(names, groups, strict=True))


def _shard(file: str, group: list[TensorSpec], metadata: Mapping[str, str]) -> Shard:
    aligned_ones = [t for t in group if t.nbytes % ALIGN_BYTES == 0]
    others = sorted((t for t in group if t.nbytes % ALIGN_BYTES), key=lambda t: -SAFETENSORS_DTYPES[t.dtype].bits)
    tensors = (*aligned_ones, *others)
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
    """The JSON header of `shard`, padded with spaces to `shard.header_bytes` bytes."""
    entries, start = [_metadata_entry(metadata)], 0
    for spec in shard.tensors:
        entries.append(_entry(spec, start, start + spec.nbytes))
        start += spec.nbytes
    text = f"{{{','.join(entries)}}}".encode()
    if len(text) > shard.header_bytes:
        raise LayoutError(f"{shard.file}: a header of {len(text)} bytes exceeds the {shard.header_bytes} reserved")
    return text.ljust(shard.header_bytes)
