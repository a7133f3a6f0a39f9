"""A transformers model loaded for compression: checked, fingerprinted, its matrices found.

`load_model` takes a folder of safetensors, a .gguf file or the name of a model on the Hugging Face hub. It never runs
code that came with a model and opens no pickles.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reallm.errors import UserError

from .matrices import Matrix, discover
from .source import load_dense, load_tokenizer, locate

__all__ = [
    "LoadedModel",
    "Matrix",
    "check_finite",
    "check_storable",
    "discover",
    "load_model",
    "max_positions",
    "model_digest",
]

STORED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# What depends on where a model lies and on who saved it, and not on what it computes.
_INCIDENTAL = frozenset({"architectures", "dtype", "torch_dtype", "transformers_version", "quantization_config"})


@dataclass
class LoadedModel:
    """A model, its tokenizer and what was found in it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    source: str
    """As the user gave it."""
    digest: str
    """See `model_digest`."""
    dtype: torch.dtype
    blocks: tuple[str, ...]
    """Module paths of the repeated blocks, in order."""
    matrices: tuple[Matrix, ...]
    notes: tuple[str, ...] = ()
    """What the user should hear about the source, one line each."""

    @property
    def is_encoder(self) -> bool:
        """Whether it predicts masked tokens instead of the next one."""
        return not self.model.can_generate()

    @property
    def max_positions(self) -> int | None:
        """The longest context in tokens; None where the configuration sets no limit."""
        return max_positions(self.model)

    def weight(self, matrix: Matrix) -> Tensor:
        """W of `matrix`, a float32 copy [rows, cols]."""
        tensor: Tensor = self.model.get_parameter(matrix.parameter).detach()
        if matrix.expert is not None:
            tensor = tensor[matrix.expert]
        if matrix.transposed:
            tensor = tensor.T
        return torch.empty(matrix.rows, matrix.cols, dtype=torch.float32, device=tensor.device).copy_(tensor)

    def other_tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every stored tensor that is not a matrix; of tied ones the first name."""
        matrices = {self.model.get_parameter(matrix.parameter) for matrix in self.matrices}
        seen = {id(tensor) for tensor in matrices}
        others: dict[str, tuple[int, ...]] = {}
        for name, tensor in stored_tensors(self.model):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                others[name] = tuple(tensor.shape)
        return others


def load_model(source: str | Path, dtype: torch.dtype | None = None) -> LoadedModel:
    """Load `source` on the CPU and find its matrices; `dtype` None keeps the file's (bfloat16 for GGUF).

    Raises UserError, one line, for a source that is unknown, damaged, incomplete, quantised or of an unsupported
    architecture, and for NaN or infinity in a tensor.
    """
    place = locate(source)
    model, notes = load_dense(place, dtype)
    check_finite(model, place.label)
    blocks, matrices = discover(model)
    return LoadedModel(
        model=model,
        tokenizer=load_tokenizer(place),
        source=place.label,
        digest=model_digest(model),
        dtype=model.dtype,
        blocks=blocks,
        matrices=matrices,
        notes=notes,
    )


def max_positions(model: PreTrainedModel) -> int | None:
    """The longest context of `model` in tokens; None where its configuration sets no limit."""
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings == limit and module.padding_idx is not None:
            return limit - module.padding_idx - 1  # learned positions counted from after the padding's (RoBERTa)
    return limit


def check_storable(loaded: LoadedModel) -> None:
    """Raise UserError, naming the tensor, unless the model's dtype holds whatever is not compressed bit for bit."""
    if loaded.dtype not in STORED_DTYPES:
        raise UserError(f"{loaded.source}: its weights are {loaded.dtype}; expected float16, bfloat16 or float32")
    tensors = loaded.model.state_dict()
    for name in loaded.other_tensors():
        if not torch.equal(tensors[name].to(loaded.dtype).to(tensors[name].dtype), tensors[name]):
            raise UserError(
                f"{loaded.source}: tensor {name} is {tensors[name].dtype} and loses bits as {loaded.dtype}, in which "
                "all that is not compressed is stored; save the model in float32 and measure that"
            )


def stored_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every parameter and persistent buffer, tied ones under each name, in state-dict order."""
    yield from model.state_dict(keep_vars=True).items()


def check_finite(model: PreTrainedModel, label: str) -> None:
    """Raise UserError, naming the tensor and how many, when a stored value is NaN or infinite."""
    for name, tensor in stored_tensors(model):
        if not tensor.is_floating_point() or bool(tensor.detach().sum(dtype=torch.float32).isfinite()):
            continue  # a sum is finite only if every term is; that it is not may be overflow, so count
        count = int((~tensor.detach().isfinite()).sum())
        if count:
            what = f"{count} of the {tensor.numel()} values of {name} are NaN or infinite"
            raise UserError(f"{label}: {what}; expected finite weights: get an undamaged copy of the model")


def model_digest(model: PreTrainedModel) -> str:
    """sha256 over class, configuration, and name, shape, dtype and bytes of every stored tensor, in name order.

    The same wherever the model lies, however it is sharded and whichever file format it came from.
    """
    digest = hashlib.sha256(json.dumps([type(model).__name__, _configuration(model)], sort_keys=True).encode())
    first: dict[int, str] = {}
    for name, tensor in sorted(stored_tensors(model), key=lambda item: item[0]):
        owner = first.setdefault(id(tensor), name)
        digest.update(f"\n{name} {tuple(tensor.shape)} {tensor.dtype} {owner}\n".encode())
        if owner == name:
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _configuration(model: PreTrainedModel) -> object:
    """The configuration as JSON values, without its defaults (a new release adds some) and what is incidental."""
    values = json.loads(json.dumps(model.config.to_dict(), default=str))
    defaults = json.loads(json.dumps(type(model.config)().to_dict(), default=str))
    absent = object()
    return {
        key: value
        for key, value in values.items()
        if key not in _INCIDENTAL and not key.startswith("_") and value != defaults.get(key, absent)
    }
