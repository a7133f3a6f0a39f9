"""The transformers class of an artifact, and the shapes of its matrices, without loading any weights."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from reallm.errors import UserError
from reallm.models.settings_errors import check_config, settings_errors

from .directory import read_config
from .quantization_config import QuantizationRecord


def model_class_of(folder: Path) -> type[PreTrainedModel]:
    """The transformers class that config.json names. Raises UserError if transformers has no such model."""
    names = read_config(folder).get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    kind = getattr(transformers, name, None) if name.isidentifier() else None
    if not isinstance(kind, type) or not issubclass(kind, PreTrainedModel):
        raise UserError(
            f"{folder}/config.json names the architecture {name!r}, which transformers {transformers.__version__} does "
            "not have; install a version that has it (manifest.json names the one that it was made with)"
        )
    return kind


def matrix_shapes(folder: Path, record: QuantizationRecord) -> dict[str, tuple[int, int]]:
    """Name -> (rows, cols) of every matrix that `record` packs, from the model that config.json describes.

    Raises UserError if no model can be built from config.json, or if it lacks one of these matrices.
    """
    kind = model_class_of(folder)
    check_config(folder)
    with settings_errors(folder, f"{folder}/config.json does not describe a {kind.__name__}"), torch.device("meta"):
        model = kind(kind.config_class.from_pretrained(folder))
    transposed = frozenset(record.transposed)
    return {name: _shape(model, name, transposed, folder) for name, _ in record.matrices()}


def _shape(model: PreTrainedModel, name: str, transposed: frozenset[str], folder: Path) -> tuple[int, int]:
    """(rows, cols) of one matrix: a linear or embedding module, or a slice of a stack of experts."""
    prefix = f"{model.base_model_prefix}."
    for path in (name, name.removeprefix(prefix), prefix + name):
        try:
            module = model.get_submodule(path)
        except AttributeError:
            module = None
        if isinstance(module, Conv1D):
            return module.nf, module.nx
        if isinstance(module, nn.Linear | nn.Embedding):
            rows, cols = module.weight.shape
            return rows, cols
        stack = path.rpartition(".")[0]
        try:
            tensor = model.get_parameter(stack)
        except AttributeError:
            continue
        if tensor.ndim == 3:
            rows, cols = tensor.shape[1:]
            return (cols, rows) if name.rpartition(".")[0] in transposed else (rows, cols)
    raise UserError(f"{folder}/config.json names {name!r}, which {type(model).__name__} does not have")
