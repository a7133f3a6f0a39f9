"""Writing weights files, which appear complete under their final names or not at all. `layout` computes their sizes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .layout import (
    INDEX_FILE,
    LENGTH_BYTES,
    MAX_SHARD_BYTES,
    METADATA,
    LayoutError,
    Shard,
    TensorSpec,
    header_text,
    plan_shards,
)

Buffer = bytes | bytearray | memoryview | NDArray[Any]
Payload = Buffer | Callable[[], Buffer]


def write_weights(
    folder: Path,
    tensors: Mapping[str, tuple[str, Sequence[int], Payload]],
    metadata: Mapping[str, str] = METADATA,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> tuple[Path, ...]:
    """Write `tensors` to `folder` as one file, or as shards and an index. Returns the weights files.

    `tensors` maps a name to its safetensors dtype, its shape and its bytes, or a function that returns the bytes. A
    function is called when its tensor is written, so only one such tensor is in memory at a time.

    The files get their final names only when all of them are complete and on disk; after any failure (a full disk,
    Ctrl-C) none of them is left. Raises LayoutError for a payload of the wrong size and when `folder` already holds
    weights files that this call would not replace.
    """
    specs = [TensorSpec(name, dtype, tuple(shape)) for name, (dtype, shape, _) in tensors.items()]
    shards = plan_shards(specs, metadata, max_shard_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    index = [INDEX_FILE] if len(shards) > 1 else []
    finals = [folder / name for name in [shard.file for shard in shards] + index]
    if foreign := sorted(set(folder.glob("model*.safetensors*")) - set(finals)):
        raise LayoutError(f"{foreign[0]} is in the way of new weights; give another folder or remove it")
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
        raise LayoutError(f"{shard.file} has {path.stat().st_size} bytes after writing; planned were {shard.nbytes}")


def _index_text(shards: Sequence[Shard]) -> bytes:
    total = sum(spec.nbytes for shard in shards for spec in shard.tensors)
    weight_map = {spec.name: shard.file for shard in shards for spec in shard.tensors}
    return (
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
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
