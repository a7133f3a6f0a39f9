"""The tensors in an artifact's files compared with those that a model expects, before any data is read or allocated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reallm.artifacts.directory import read_config
from reallm.errors import UserError
from reallm.kernels.storage.dtypes import SAFETENSORS_DTYPES
from reallm.kernels.storage.layout import LayoutError
from reallm.kernels.storage.safetensors_reader import StoredTensor, read_header
from reallm.models.stored_dtypes import narrowed
from reallm.system.torch_dtypes import TORCH_NAMES

from .install import packed_tensors


def read_headers(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """The tensors of all weights files by name. Raises UserError for a damaged header or a name in two files."""
    stored: dict[str, StoredTensor] = {}
    for file in files:
        try:
            header = read_header(file)
        except LayoutError as error:
            raise UserError(str(error)) from None
        if repeated := stored.keys() & header.keys():
            raise UserError(f"{file}: tensor {min(repeated)!r} is in another file too; copy the artifact again")
        stored |= header
    return stored


def check_headers(model: PreTrainedModel, stored: Mapping[str, StoredTensor], folder: Path, part: bool) -> None:
    """Compare the tensors in the files of `folder` with those of the model, which has its packed modules.

    Raises UserError unless every field is stored as U8 with its exact size, and every other tensor with its shape. A
    `part` of the artifact's model (see `parts`) may have tensors of its own, but not in its blocks.
    """
    expected = packed_tensors(model)
    for name, raw in expected.items():
        tensor = _find(stored, name, model.base_model_prefix)
        if tensor is None:
            raise UserError(f"{folder}: tensor {name!r} is missing; copy or compile the artifact again")
        if tensor.dtype != "U8" or tensor.shape != tuple(raw.shape):
            raise UserError(
                f"{tensor.path}: tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, expected U8 {list(raw.shape)}"
            )
    _check_others(model, stored, set(expected), folder, part)


def _check_others(
    model: PreTrainedModel, stored: Mapping[str, StoredTensor], packed: set[str], folder: Path, part: bool
) -> None:
    """Check the tensors that are not packed."""
    tied = set(model.all_tied_weights_keys) | set(model.all_tied_weights_keys.values())
    for name, tensor in model.state_dict().items():
        if name in packed:
            continue
        file_tensor = _find(stored, name, model.base_model_prefix)
        if file_tensor is None and name not in tied:
            if not part:
                raise UserError(f"tensor {name!r} is missing from the weights; copy or compile the artifact again")
            if _in_a_block(name, model):
                kind = type(model).__name__
                raise UserError(
                    f"{folder} cannot be loaded as {kind}, whose tensor {name!r} it does not have; load the class that "
                    "`architectures` in its config.json names"
                )
        if file_tensor is None:
            continue
        if file_tensor.shape != tuple(tensor.shape) or not _fits(file_tensor, tensor):
            kind = "floats" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")
            found = f"{file_tensor.dtype} {list(file_tensor.shape)}"
            raise UserError(f"{file_tensor.path}: tensor {name!r} is {found}, expected {kind} {list(tensor.shape)}")


def _in_a_block(name: str, model: PreTrainedModel) -> bool:
    """Whether a tensor is in a numbered part of the base model, where no class has tensors of its own."""
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    return name.startswith(prefix) and any(part.isdecimal() for part in name.split("."))


def _fits(file_tensor: StoredTensor, tensor: Tensor) -> bool:
    """Whether the stored dtype can become that of `tensor`: any float a float, otherwise only the same dtype."""
    dtype = _torch_dtype(file_tensor)
    return dtype == tensor.dtype or bool(dtype and dtype.is_floating_point and tensor.is_floating_point())


def _torch_dtype(tensor: StoredTensor) -> torch.dtype | None:
    short = SAFETENSORS_DTYPES[tensor.dtype].name
    return next((dtype for dtype, name in TORCH_NAMES.items() if name == short), None)


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The dtype that config.json in `folder` names, the one that most of the model had; None if it names none.

    transformers overwrites this value in the configuration object, so it has to be read from the file.
    """
    config = read_config(folder)
    value = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return value if isinstance(value, torch.dtype) else None


def keep_stored_dtypes(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> None:
    """Give the float tensors of the model the dtypes that they have in the files, except for packed ones and weights of
    layers, which have the model's dtype (see `models.stored_dtypes`).

    The model is on "meta". transformers converts each tensor that it reads to the dtype of the model's tensor, so
    nothing is converted then, except for the tensors that the model's class always keeps in float32.
    """
    for name, tensor in narrowed(model):
        file_tensor = _find(stored, name, model.base_model_prefix)
        dtype = None if file_tensor is None else _torch_dtype(file_tensor)
        if dtype is not None and dtype.is_floating_point and tensor.dtype != dtype:
            tensor.data = torch.empty_like(tensor, dtype=dtype)


def _find(stored: Mapping[str, StoredTensor], name: str, prefix: str) -> StoredTensor | None:
    for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        if candidate in stored:
            return stored[candidate]
    return None
