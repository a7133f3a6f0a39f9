"""An artifact loaded as another class than the compiled one: its base model, one with another head, or its text part.

What the other class lacks is left out of the record. Its tensors may have other prefixes than those of the whole model;
transformers knows these changes of prefixes for the checkpoints of such models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from reallm.artifacts.directory import read_config
from reallm.artifacts.quantization_config import QuantizationRecord


def is_part(model: PreTrainedModel, folder: Path) -> bool:
    """Whether the class of `model` is another one than that of the artifact in `folder`."""
    return type(model).__name__ not in (read_config(folder).get("architectures") or ())


def prefix_changes(conversions: Iterable[Any]) -> list[Any]:
    """The changes of prefixes among transformers' conversions of a checkpoint."""
    return [change for change in conversions if type(change).__name__ == "PrefixChange"]


def changes_of(model: PreTrainedModel) -> list[Any]:
    """The changes that turn the names of a whole model into those of `model`."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return prefix_changes(get_model_conversion_mapping(model))


def renamed(name: str, changes: Sequence[Any]) -> str:
    """The name of a tensor or module of the whole model in the part."""
    for change in changes:
        name, _ = change.rename_source_key(name)
    return name


def candidates(name: str, model: PreTrainedModel) -> tuple[str, str, str]:
    """`name`, and `name` without and with the prefix of the base model, by which a model may differ from its part."""
    prefix = f"{model.base_model_prefix}."
    return name, name.removeprefix(prefix), prefix + name


def record_of_part(record: QuantizationRecord, model: PreTrainedModel, changes: Sequence[Any]) -> QuantizationRecord:
    """The record of what `model`, which has its own modules, has of the whole model, under the part's names."""
    names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}

    def present(matrix: str) -> bool:
        stack, _, index = matrix.rpartition(".")
        owners = (matrix, stack) if index.isdecimal() else (matrix,)  # an expert is a slice of a parameter
        return any(name in names for owner in owners for name in candidates(owner, model))

    def kept(listed: Iterable[str]) -> tuple[str, ...]:
        return tuple(name for name in (renamed(matrix, changes) for matrix in listed) if present(name))

    formats = {fmt: kept(matrices) for fmt, matrices in record.formats.items()}
    shared = {key: kept(matrices) for key, matrices in record.shared.items()}
    ties = {renamed(head, changes): renamed(source, changes) for head, source in record.tied.items()}
    changed = {
        "formats": {fmt: matrices for fmt, matrices in formats.items() if matrices},
        "shared": {key: matrices for key, matrices in shared.items() if matrices},
        "tied": {head: source for head, source in ties.items() if present(head) and present(source)},
        "aliases": {renamed(a, changes): renamed(b, changes) for a, b in record.aliases.items()},
        "transposed": kept(record.transposed),
    }
    return record.model_copy(update=changed)
