"""Checks of a model's weights files before any of them reaches transformers.

The headers are read by `kernels.storage.safetensors_reader`; here its errors become UserErrors.
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
    """The JSON object in `path`. Raises UserError when the file is missing, damaged or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or not JSON
        raise UserError(f"{path} cannot be read as JSON ({error}); get the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}; expected an object; get the file again")
    return value


def read_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint in `folder`, one file or shards, with all headers checked.

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
    """The dtype in which most bytes are stored; float32 for float64. Raises UserError when it is not a plain float.

    `label` names the model in the error.
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
