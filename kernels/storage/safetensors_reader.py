"""Reading the headers of weights files, with every number in them checked. Layout: see `layout`.

Both the artifacts that reallm writes and the models it compresses are read here.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from .layout import INDEX_FILE, LENGTH_BYTES, MAX_HEADER_BYTES, WEIGHTS_FILE, LayoutError, TensorSpec

_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor is stored: bytes [start, stop) of the file `path`. `dtype` is the safetensors name."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return self.stop - self.start


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Name -> place of each tensor of one safetensors file, in the order of offsets. Reads none of their data.

    Checked before anything is allocated: the length of the header; JSON without repeated keys; known dtypes; sizes
    that equal shape times dtype; offsets without holes or overlaps that end where the file ends. Raises LayoutError.
    """
    text, file_bytes = _header_bytes(path)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON ({error})") from None
    if not isinstance(header, dict) or text[:1] != b"{":
        raise _damaged(path, "its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "__metadata__ must map strings to strings")
    data_start = LENGTH_BYTES + len(text)
    tensors = [(name, _stored_tensor(path, name, entry, data_start)) for name, entry in header.items()]
    tensors.sort(key=lambda item: (item[1].start, item[1].stop, item[0]))
    _check_contiguous(path, tensors, data_start, file_bytes)
    return dict(tensors)


def _damaged(path: Path, detail: str) -> LayoutError:
    return LayoutError(f"{path} is truncated or damaged: {detail}; copy or download it again")


def _header_bytes(path: Path) -> tuple[bytes, int]:
    """The header's bytes, and the size of the file."""
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
            if file_bytes < LENGTH_BYTES or not 2 <= length <= min(MAX_HEADER_BYTES, file_bytes - LENGTH_BYTES):
                raise _damaged(path, f"its header should take {length} bytes, the whole file has {file_bytes}")
            return stream.read(length), file_bytes
    except OSError as error:
        raise LayoutError(f"{path} cannot be read: {error.strerror}; check the path and its permissions") from None


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _stored_tensor(path: Path, name: str, entry: object, data_start: int) -> StoredTensor:
    """One checked entry of a header. Raises LayoutError."""
    if not isinstance(entry, dict) or set(entry) != _ENTRY_KEYS:
        raise _damaged(path, f"tensor {name!r} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise _damaged(path, f"tensor {name!r} has a dtype or shape that cannot be read")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise _damaged(path, f"tensor {name!r} has offsets that cannot be read")
    try:
        spec = TensorSpec(name, dtype, tuple(shape))
    except LayoutError as error:
        raise _damaged(path, str(error)) from None
    nbytes = offsets[1] - offsets[0]
    if spec.nbytes != nbytes:
        raise _damaged(path, f"tensor {name!r} of {dtype} {shape} takes {spec.nbytes} bytes, its offsets give {nbytes}")
    return StoredTensor(path, dtype, spec.shape, data_start + offsets[0], data_start + offsets[1])


def _check_contiguous(path: Path, tensors: list[tuple[str, StoredTensor]], data_start: int, file_bytes: int) -> None:
    end = data_start
    for name, tensor in tensors:
        if tensor.start != end:
            raise _damaged(path, f"tensor {name!r} starts at byte {tensor.start}, the one before it ends at {end}")
        end = tensor.stop
    if end != file_bytes:
        raise _damaged(path, f"the file has {file_bytes} bytes, its header describes {end}")


def read_folder(folder: Path, allow_unlisted: bool = False) -> dict[str, StoredTensor]:
    """The tensors of model.safetensors, or of all shards that model.safetensors.index.json names, checked.

    With `allow_unlisted`, shards may hold tensors that the index does not list, as transformers accepts.

    Raises LayoutError for a folder without weights, a missing or damaged file, a shard outside the folder, and an
    index that contradicts the shards.
    """
    if (folder / WEIGHTS_FILE).exists():
        return read_header(folder / WEIGHTS_FILE)
    index = folder / INDEX_FILE
    if not index.exists():
        raise LayoutError(f"{folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}; copy or download it again")
    weight_map = _read_index(index)
    files = sorted(set(weight_map.values()))
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise LayoutError(f"{folder} lacks the shard {missing[0]} that {INDEX_FILE} names; copy or download it")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        shard = read_header(folder / file)
        for name in shard:
            listed = weight_map.get(name)
            if listed != file and not (listed is None and allow_unlisted):
                raise LayoutError(
                    f"{index}: tensor {name!r} is in {file}, the index says {listed}; copy or download the folder again"
                )
        tensors |= shard
    if absent := sorted(set(weight_map) - set(tensors)):
        raise LayoutError(
            f"{index} names tensor {absent[0]!r}, which {weight_map[absent[0]]} does not hold; "
            "copy or download the folder again"
        )
    return tensors


def _read_index(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_bytes().decode(), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError, OSError) as error:
        raise LayoutError(f"{index} cannot be read: {error}; copy or download it again") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise LayoutError(f"{index} has no weight_map; copy or download it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise LayoutError(
                f"{index}: tensor {name!r} is in {file!r}, expected a .safetensors file beside the index; "
                "copy or download it again"
            )
    return weight_map
