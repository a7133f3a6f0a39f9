"""What the writers of model folders share: other tensors in fp16, the configuration, and the tokenizer's files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.pytorch_utils import Conv1D

from reallm.artifacts.architecture import model_class_of
from reallm.artifacts.directory import CARD_FILE, read_config
from reallm.artifacts.manifest import MANIFEST_FILE
from reallm.artifacts.stored_values import read_bytes, read_floats
from reallm.errors import UserError
from reallm.kernels.storage.dtypes import SAFETENSORS_FLOATS
from reallm.kernels.storage.layout import CONFIG_FILE

from .packed_integers import PackedArtifact

NOT_COPIED = {CARD_FILE, MANIFEST_FILE, CONFIG_FILE}


class DenseTensors:
    """The tensors of an artifact that are not packed, floats in fp16 because the engine keeps its scales in it."""

    def __init__(self, packed: PackedArtifact) -> None:
        self.stored = dict(packed.dense())
        self.changed: dict[str, float] = {}
        """Tensor -> largest absolute change by rounding to fp16, filled while the tensors are read."""

    def specs(self) -> dict[str, tuple[str, Sequence[int], Callable[[], NDArray[Any]]]]:
        """Name -> (safetensors dtype, shape, function that reads the values)."""
        return {
            name: ("F16" if t.dtype in SAFETENSORS_FLOATS else t.dtype, t.shape, partial(self.read, name))
            for name, t in self.stored.items()
        }

    def read(self, name: str) -> NDArray[Any]:
        """The values of one tensor, flat. Raises UserError for a value that overflows fp16."""
        tensor = self.stored[name]
        if tensor.dtype not in SAFETENSORS_FLOATS:
            return read_bytes(tensor)
        values = read_floats(tensor).astype(np.float32)
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        if not np.isfinite(halves).all():
            raise UserError(f"{name} has values beyond fp16, in which the engine keeps scales: it cannot be exported")
        change = float(np.abs(halves.astype(np.float32) - values).max(initial=0.0))
        if change:
            self.changed[name] = change
        return halves

    @property
    def notes(self) -> tuple[str, ...]:
        """What rounding to fp16 changed."""
        if not self.changed:
            return ()
        largest = max(self.changed.values())
        return (
            f"{len(self.changed)} of the {len(self.stored)} tensors that are not compressed have values that float16 "
            f"rounds, by at most {largest:.2g}",
        )


def check_modules(packed: PackedArtifact, engine: str) -> None:
    """Raise UserError if a packed matrix belongs to a module other than nn.Linear and nn.Embedding.

    GPT-2's Conv1D keeps its weight as [in, out], and engines expect it so. compressed-tensors packs only Linear
    modules: transformers would leave such a weight at its random initial values, with no more than a warning.
    """
    kind = model_class_of(packed.folder)
    with torch.device("meta"):
        model = kind(kind.config_class.from_pretrained(packed.folder))
    unsupported = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    for name in packed.types:
        if any(name == other or other.endswith(f".{name}") or name.endswith(f".{other}") for other in unsupported):
            raise UserError(
                f"{name} is a Conv1D, whose packed weights {engine} does not load; export supports models whose "
                "matrices are nn.Linear modules"
            )


def copy_files(packed: PackedArtifact, folder: Path) -> None:
    """Copy the tokenizer, what else belongs to the model, and the plan, by which `--force` knows an export."""
    for path in packed.folder.iterdir():
        if path.is_file() and path.name not in NOT_COPIED and ".safetensors" not in path.name:
            shutil.copyfile(path, folder / path.name)


def model_config(packed: PackedArtifact) -> dict[str, Any]:
    """The model's config.json without reallm's quantisation, in fp16."""
    config = read_config(packed.folder)
    for key in ("quantization_config", "torch_dtype", "transformers_weights"):
        config.pop(key, None)
    config["dtype"] = "float16"
    return config
