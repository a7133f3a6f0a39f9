"""Checks of a model's weights files, made before transformers reads any of them.

`kernels.storage.safetensors_reader` reads the headers; this module turns its errors into UserErrors.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from reallm.errors import LayoutError, UserError
from reallm.kernels.storage.dtypes import SAFETENSORS_DTYPES, SAFETENSORS_FLOATS
from reallm.kernels.storage.layout import INDEX_FILE, WEIGHTS_FILE
from reallm.kernels.storage.safetensors_reader import StoredTensor, read_folder
from reallm.system.torch_dtypes import TORCH_DTYPES


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in `path`. Raises UserError if the file is missing or damaged, or holds no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or not JSON
        raise UserError(f"{path} cannot be read as JSON ({error}); get the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}; expected an object; get the file again")
    return value


def read_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """List the tensors of the checkpoint in `folder` (one file or shards) by name, after checking all headers.

    Raises UserError for a folder without weights, a missing shard, a damaged file and an index that contradicts the
    shards.
    """
    if not any((folder / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE)):
        if pickled := sorted(path.name for path in folder.glob("*.bin")):
            raise UserError(f"{folder} has only pickled weights ({pickled[0]}), expected {WEIGHTS_FILE}; convert them")
        expected = f"{WEIGHTS_FILE} or {INDEX_FILE}"
        raise UserError(f"{folder} has no weights: expected {expected}; download the model's weights")
    try:
        return read_folder(folder, allow_unlisted=True)
    except LayoutError as error:
        raise UserError(str(error)) from None


def main_dtype(tensors: Iterable[StoredTensor], label: str) -> torch.dtype:
    """The dtype that takes up most bytes of `tensors`; float32 instead of float64.

    Raises UserError, naming the model as `label`, when this is not a floating-point type that can be compressed.
    """
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += tensor.nbytes
    name = sizes.most_common(1)[0][0] if sizes else "nothing"
    if name == "F64":
        return torch.float32
    if name not in SAFETENSORS_FLOATS:
        raise UserError(f"{label} stores its weights as {name}; expected F16, BF16 or F32: give the original model")
    return TORCH_DTYPES[SAFETENSORS_DTYPES[name].name]
