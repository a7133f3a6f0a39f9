"""Distrustful reading of weights files, before any of it reaches transformers.

A safetensors file is an 8-byte little-endian header length, that many bytes of JSON (name -> dtype, shape, [begin, end)
into the data), and the data, without holes (https://github.com/huggingface/safetensors, "Format"). A sharded checkpoint
has model.safetensors.index.json: weight_map, tensor name -> file.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from reallm.errors import UserError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the limit the safetensors format sets itself
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32}
BITS |= {"F64": 64, "I64": 64, "U64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4}
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float32}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a safetensors file: dtype as the file spells it, shape, bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; UserError when it is missing, damaged or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or not JSON
        raise UserError(f"{path} cannot be read as JSON ({error}); get the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}; expected an object; get the file again")
    return value


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, its sizes checked against the file's length; reads the header only.

    Raises UserError, naming the file, when it is missing, truncated or not what the format allows.
    """
    entries, data_bytes = _read_entries(path)
    tensors: dict[str, StoredTensor] = {}
    spans = []
    for name, entry in entries.items():
        tensors[name], span = _read_entry(path, name, entry)
        spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise _damaged(path, f"its tensors overlap or leave a hole at byte {end} of the data")
        end = stop
    if end != data_bytes:
        raise _damaged(path, f"its header describes {end} bytes of tensors, the file holds {data_bytes}")
    return tensors


def _damaged(path: Path, found: str) -> UserError:
    return UserError(f"{path} is truncated or damaged: {found}; download or copy the file again")


def _read_entries(path: Path) -> tuple[dict[str, Any], int]:
    """Header entries without the metadata, and the bytes of data after the header."""
    try:
        total = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if total < 8 or length > min(total - 8, MAX_HEADER_BYTES):
                raise _damaged(path, f"its header should take {length} bytes, the file has {total}")
            entries = json.loads(stream.read(length))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; check the path and its permissions") from None
    except (ValueError, RecursionError):
        raise _damaged(path, "its header is not JSON") from None
    if not isinstance(entries, dict):
        raise _damaged(path, "its header is no JSON object")
    entries.pop("__metadata__", None)
    return entries, total - 8 - length


def _read_entry(path: Path, name: str, entry: object) -> tuple[StoredTensor, tuple[int, int]]:
    if not isinstance(entry, dict):
        raise _damaged(path, f"the header entry of {name!r} is no object")
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _damaged(path, f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not _are_sizes(shape) or not _are_sizes(span) or len(span) != 2:
        raise _damaged(path, f"tensor {name!r} has no usable shape and data_offsets")
    nbytes = math.prod(shape) * BITS[dtype] // 8
    if span[1] - span[0] != nbytes:
        raise _damaged(path, f"tensor {name!r} should take {nbytes} bytes, its offsets say {span[1] - span[0]}")
    return StoredTensor(dtype, tuple(shape), nbytes), (span[0], span[1])


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def read_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint in `folder`, one file or shards, all headers checked.

    Raises UserError for no weights, a missing shard, a damaged file, a tensor the index promises and no shard holds.
    """
    if (folder / INDEX_FILE).is_file():
        return _read_shards(folder)
    if (folder / WEIGHTS_FILE).is_file():
        return read_header(folder / WEIGHTS_FILE)
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        raise UserError(f"{folder} has only pickled weights ({pickled[0]}), expected {WEIGHTS_FILE}; convert them")
    raise UserError(f"{folder} has no weights: expected {WEIGHTS_FILE} or {INDEX_FILE}; download the model's weights")


def _read_shards(folder: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{folder / INDEX_FILE} has no weight_map of tensor names to files; download it again")
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise UserError(f"{folder / INDEX_FILE} names the shard {file!r}; expected a file name; download it again")
        if not (folder / file).is_file():
            raise UserError(f"{folder} lacks the shard {file} that {INDEX_FILE} names; download it")
        tensors |= read_header(folder / file)
    if absent := sorted(set(weight_map) - set(tensors)):
        raise UserError(f"{folder}: no shard holds {absent[0]!r} that {INDEX_FILE} promises; download it again")
    return tensors


def main_dtype(tensors: Iterable[StoredTensor], label: str) -> torch.dtype:
    """The dtype most bytes are stored in (float64 is read as float32); UserError when that is no plain float."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += tensor.nbytes
    name = sizes.most_common(1)[0][0] if sizes else "nothing"
    if name not in DTYPES:
        raise UserError(f"{label} stores its weights as {name}; expected F16, BF16 or F32: give the original model")
    return DTYPES[name]
