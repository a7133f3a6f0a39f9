"""Weights files: written whole or not at all, read with distrust of every number. Layout and sizes: see `layout`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .layout import (
    INDEX_FILE,
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    MAX_SHARD_BYTES,
    METADATA,
    SINGLE_FILE,
    LayoutError,
    Shard,
    TensorSpec,
    header_text,
    plan_shards,
)

Buffer = bytes | bytearray | memoryview | NDArray[Any]
Payload = Buffer | Callable[[], Buffer]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: bytes [start, stop) of the file `path`."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def write_weights(
    folder: Path,
    tensors: Mapping[str, tuple[str, Sequence[int], Payload]],
    metadata: Mapping[str, str] = METADATA,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> tuple[Path, ...]:
    """Write name -> (dtype, shape, bytes or a function that gives them) as one file, or as shards and an index.

    One tensor is in memory at a time where functions are given. The files appear under their names only when all of
    them are complete and on disk; on any failure (a full disk, Ctrl-C) nothing is left. Returns the weights files.
    Raises LayoutError for a payload of the wrong size and for a folder that holds other weights.
    """
    specs = [TensorSpec(name, dtype, tuple(shape)) for name, (dtype, shape, _) in tensors.items()]
    shards = plan_shards(specs, metadata, max_shard_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    index = [INDEX_FILE] if len(shards) > 1 else []
    finals = [folder / name for name in [shard.file for shard in shards] + index]
    if strangers := sorted(set(folder.glob("model*.safetensors*")) - set(finals)):
        raise LayoutError(f"{strangers[0]} is in the way of new weights; give another folder or remove it")
    partials = [path.with_name(f".{path.name}.{os.getpid()}.partial") for path in finals]
    try:
        for shard, partial in zip(shards, partials, strict=False):
            _write_shard(partial, shard, metadata, tensors)
        if index:
            _write_synced(partials[-1], [_index_text(shards)])
        for partial, final in zip(partials, finals, strict=True):
            partial.replace(final)
        _sync_folder(folder)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)
    return tuple(finals[: len(shards)])


def _write_shard(
    path: Path, shard: Shard, metadata: Mapping[str, str], tensors: Mapping[str, tuple[str, Sequence[int], Payload]]
) -> None:
    def chunks() -> Iterator[bytes | memoryview]:
        yield shard.header_bytes.to_bytes(LENGTH_BYTES, "little")
        yield header_text(shard, metadata)
        for spec in shard.tensors:
            payload = tensors[spec.name][2]
            data = payload() if callable(payload) else payload
            view = data.data if isinstance(data, np.ndarray) else memoryview(data)
            if view.nbytes != spec.nbytes or not view.c_contiguous:
                raise LayoutError(
                    f"tensor {spec.name!r} of {spec.dtype} {list(spec.shape)} takes {spec.nbytes} contiguous bytes, "
                    f"got {view.nbytes}"
                )
            yield view

    _write_synced(path, chunks())
    if path.stat().st_size != shard.nbytes:
        raise LayoutError(f"{shard.file} came out at {path.stat().st_size} bytes, planned were {shard.nbytes}")


def _index_text(shards: Sequence[Shard]) -> bytes:
    total = sum(spec.nbytes for shard in shards for spec in shard.tensors)
    where = {spec.name: shard.file for shard in shards for spec in shard.tensors}
    return (
        json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2, sort_keys=True) + "\n"
    ).encode()


def _write_synced(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    with path.open("wb") as stream:
        for chunk in chunks:
            stream.write(chunk)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, in order of their offsets; none of their data is read.

    Checks, before anything is allocated: the length of the header, JSON without repeated keys, known dtypes, sizes that
    are shape times dtype, offsets without holes or overlaps, an end that is the end of the file. Raises LayoutError.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
            if size < LENGTH_BYTES or length < 2 or length > min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
                raise LayoutError(
                    f"{path} is no whole safetensors file: {size} bytes, and a header of {length} announced; "
                    "copy or download it again"
                )
            text = stream.read(length)
    except OSError as error:
        raise LayoutError(f"{path} cannot be read: {error.strerror}") from None
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise LayoutError(f"{path}: its header is not JSON ({error}); copy or download it again") from None
    if not isinstance(header, dict) or text[:1] != b"{":
        raise LayoutError(f"{path}: its header is not a JSON object; copy or download it again")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise LayoutError(f"{path}: __metadata__ must map strings to strings")
    base = LENGTH_BYTES + length
    stored = sorted((_stored(path, name, entry, base) for name, entry in header.items()), key=_by_offset)
    return _contiguous(path, stored, base, size)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _stored(path: Path, name: str, entry: object, base: int) -> tuple[str, StoredTensor]:
    """One checked entry of a header. Raises LayoutError."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise LayoutError(f"{path}: tensor {name!r} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise LayoutError(f"{path}: tensor {name!r} has a dtype or shape that cannot be read")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise LayoutError(f"{path}: tensor {name!r} has offsets that cannot be read")
    try:
        spec = TensorSpec(name, dtype, tuple(shape))
    except LayoutError as error:
        raise LayoutError(f"{path}: {error}") from None
    if spec.nbytes != offsets[1] - offsets[0]:
        raise LayoutError(
            f"{path}: tensor {name!r} of {dtype} {shape} takes {spec.nbytes} bytes, its offsets give "
            f"{offsets[1] - offsets[0]}"
        )
    return name, StoredTensor(path, dtype, spec.shape, base + offsets[0], base + offsets[1])


def _by_offset(item: tuple[str, StoredTensor]) -> tuple[int, int, str]:
    return item[1].start, item[1].stop, item[0]


def _contiguous(path: Path, stored: list[tuple[str, StoredTensor]], base: int, size: int) -> dict[str, StoredTensor]:
    end = base
    for name, tensor in stored:
        if tensor.start != end:
            raise LayoutError(f"{path}: tensor {name!r} starts at byte {tensor.start}, the one before it ends at {end}")
        end = tensor.stop
    if end != size:
        raise LayoutError(
            f"{path} has {size} bytes, its header describes {end}: it is cut off or was written over; "
            "copy or download it again"
        )
    return dict(stored)


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of model.safetensors, or of all shards that model.safetensors.index.json names, checked.

    Raises LayoutError: no weights, a missing shard, a shard outside the folder, an index that differs from the shards.
    """
    if (folder / SINGLE_FILE).exists():
        return read_header(folder / SINGLE_FILE)
    index = folder / INDEX_FILE
    if not index.exists():
        raise LayoutError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}")
    where = _read_index(index)
    tensors: dict[str, StoredTensor] = {}
    files = sorted(set(where.values()))
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise LayoutError(f"{index} names {missing[0]}, which is missing; copy or download it again")
    for file in files:
        found = read_header(folder / file)
        if wrong := [name for name in found if where.get(name) != file]:
            raise LayoutError(f"{index}: tensor {wrong[0]!r} lies in {file}, the index says {where.get(wrong[0])}")
        tensors |= found
    if lost := sorted(set(where) - set(tensors)):
        raise LayoutError(f"{index} names tensor {lost[0]!r}, which {where[lost[0]]} does not hold")
    return tensors


def _read_index(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_bytes().decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError, OSError) as error:
        raise LayoutError(f"{index} cannot be read: {error}") from None
    where = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(where, dict) or not where:
        raise LayoutError(f"{index} has no weight_map")
    for name, file in where.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise LayoutError(f"{index}: tensor {name!r} lies in {file!r}, expected a .safetensors file beside it")
    return where
