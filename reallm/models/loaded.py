"""A transformers model loaded for compression: checked, with a digest of its weights and a list of its matrices.

`load_model` takes a folder of safetensors, a .gguf file or the name of a model on the Hugging Face hub. It never runs
code that comes with a model and never opens a pickle.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reallm.errors import UserError
from reallm.system.progress import without_bars_in_files
from reallm.system.scratch import Scratch
from reallm.system.torch_dtypes import FLOAT_NAMES, TORCH_NAMES

from .checkpoint import read_checkpoint
from .gguf_once import reading_gguf_once
from .limits import max_positions, vocabulary_size
from .matrices import discover
from .matrix import Matrix
from .processor import processor_files
from .sentence_encoder import SentenceEncoder, gives_embeddings, read_sentence_encoder
from .source import load_dense, locate
from .stored_dtypes import restore_stored_dtypes
from .tokenizer import load_tokenizer

__all__ = [
    "LoadedModel",
    "Matrix",
    "check_storable",
    "discover",
    "load_model",
    "model_digest",
]

# Settings of a configuration that depend on how the model was saved and do not change what it computes.
_INCIDENTAL = frozenset({"architectures", "dtype", "torch_dtype", "transformers_version", "quantization_config"})


@dataclass
class LoadedModel:
    """A model with its tokenizer, its blocks and its weight matrices."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    source: str
    """Path or hub name, as the user gave it."""
    digest: str
    """sha256 of the configuration and the weights; see `model_digest`."""
    dtype: torch.dtype
    """The dtype of the weights."""
    blocks: tuple[str, ...]
    """Module paths of the repeated blocks, in order."""
    matrices: tuple[Matrix, ...]
    """All weight matrices, in module order."""
    notes: tuple[str, ...] = ()
    """Notes for the user about the source, one line each."""
    sentence_encoder: SentenceEncoder | None = None
    """What the model computes from its hidden states, if it is an encoder without an output layer for tokens."""
    processor_files: tuple[Path, ...] = ()
    """The files of the model's processor for images or sound, to be copied as they are."""
    scratch: Scratch | None = None
    """Where large tensors go if the model does not fit into memory; None if it does."""

    @property
    def is_encoder(self) -> bool:
        """Whether the model predicts masked tokens instead of the next one."""
        return not self.model.can_generate()

    @property
    def max_positions(self) -> int | None:
        """The longest context in tokens; None where nothing limits it."""
        return max_positions(self.model)

    @property
    def vocabulary(self) -> int | None:
        """Number of token ids that the model can read and predict; None if it is unknown."""
        return vocabulary_size(self.model)

    def weight(self, matrix: Matrix) -> Tensor:
        """A float32 copy of the weights of `matrix`, [rows, cols]."""
        tensor: Tensor = self.model.get_parameter(matrix.parameter).detach()
        if matrix.expert is not None:
            tensor = tensor[matrix.expert]
        if matrix.transposed:
            tensor = tensor.T
        return torch.empty(matrix.rows, matrix.cols, dtype=torch.float32, device=tensor.device).copy_(tensor)

    def other_tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every stored tensor that is not a matrix; a tied tensor is listed only by its first name."""
        matrices = {self.model.get_parameter(matrix.parameter) for matrix in self.matrices}
        seen = {id(tensor) for tensor in matrices}
        others: dict[str, tuple[int, ...]] = {}
        for name, tensor in stored_tensors(self.model):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                others[name] = tuple(tensor.shape)
        return others

    def other_dtypes(self) -> dict[str, str]:
        """Name -> dtype ("f32", "i64", ...) of those of `other_tensors` that are not in the model's dtype."""
        tensors = self.model.state_dict()
        return {n: TORCH_NAMES[tensors[n].dtype] for n in self.other_tensors() if tensors[n].dtype != self.dtype}


@reading_gguf_once
def load_model(source: str | Path, dtype: torch.dtype | None = None, scratch: Scratch | None = None) -> LoadedModel:
    """Load `source` on the CPU and find its matrices.

    With `dtype` None the weights keep the dtype of the file (bfloat16 for GGUF). The weights of a model that does not
    fit into memory stay in its files (see `large`); `scratch` is where large tensors then go, by default the system's
    folder for temporary files. Raises UserError with a message of one
    line for a source that is unknown, damaged, incomplete, of an unsupported architecture or quantisation, and for NaN
    or infinity in a tensor.
    """
    with without_bars_in_files():
        located = locate(source)
        model, notes, place = load_dense(located, dtype, scratch or Scratch.default())
    _stop_rescaling(model)
    if dtype is None and located.gguf_file is None:
        notes = (*notes, *restore_stored_dtypes(model, read_checkpoint(located.folder)))
    digest = model_digest(model, located.label)
    blocks, matrices = discover(model)
    return LoadedModel(
        model=model,
        tokenizer=load_tokenizer(located),
        source=located.label,
        digest=digest,
        dtype=weights_dtype(model),
        blocks=blocks,
        matrices=matrices,
        notes=notes,
        sentence_encoder=read_sentence_encoder(located.folder) if gives_embeddings(model) else None,
        processor_files=() if located.gguf_file else processor_files(located.folder),
        scratch=place,
    )


def _stop_rescaling(model: PreTrainedModel) -> None:
    """Switch off RWKV's rescaling, which changes weights in place whenever the model runs; the output is the same."""
    if hasattr(model.config, "rescale_every"):
        model.config.rescale_every = 0


def weights_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype that most bytes of the parameters of `model` have."""
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] += parameter.nbytes
    return sizes.most_common(1)[0][0] if sizes else model.dtype


def check_storable(loaded: LoadedModel) -> None:
    """Raise UserError, naming the tensor, if an artifact cannot store the weights in their dtypes."""
    if loaded.dtype not in FLOAT_NAMES:
        raise UserError(f"{loaded.source}: its weights are {loaded.dtype}; expected float16, bfloat16 or float32")
    for name, tensor in stored_tensors(loaded.model):
        if tensor.dtype not in TORCH_NAMES:
            raise UserError(f"{loaded.source}: tensor {name} is {tensor.dtype}, which artifacts do not store")
    for matrix in loaded.matrices:
        dtype = loaded.model.get_parameter(matrix.parameter).dtype
        if dtype not in (loaded.dtype, torch.float32):
            raise UserError(
                f"{loaded.source}: matrix {matrix.name} is {dtype} in a model of {loaded.dtype}; expected the same "
                "dtype or float32: save the model in one dtype"
            )


def stored_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every parameter and persistent buffer in state-dict order; tied ones under all their names."""
    yield from model.state_dict(keep_vars=True).items()


def model_digest(model: PreTrainedModel, label: str | None = None) -> str:
    """sha256 of a model: its class, its configuration, and name, shape, dtype and bytes of every stored tensor.

    Tensors are in name order. The digest does not depend on the path, the sharding or the file format of the model.
    With a `label` for the model, raises UserError if a stored value is NaN or infinite; so each tensor is read once.
    """
    digest = hashlib.sha256(json.dumps([type(model).__name__, _configuration(model)], sort_keys=True).encode())
    first: dict[int, str] = {}
    for name, tensor in sorted(stored_tensors(model), key=lambda item: item[0]):
        owner = first.setdefault(id(tensor), name)
        digest.update(f"\n{name} {tuple(tensor.shape)} {tensor.dtype} {owner}\n".encode())
        if owner == name:
            if label is not None:
                _check_finite(name, tensor.detach(), label)
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_finite(name: str, tensor: Tensor, label: str) -> None:
    """Raise UserError if a value is NaN or infinite; the message names the tensor and counts such values."""
    if not tensor.is_floating_point() or bool(tensor.sum(dtype=torch.float32).isfinite()):
        return  # a finite sum has only finite terms; a sum that is not finite may have overflowed, so count below
    count = int((~tensor.isfinite()).sum())
    if count:
        what = f"{count} of the {tensor.numel()} values of {name} are NaN or infinite"
        raise UserError(f"{label}: {what}; expected finite weights: get an undamaged copy of the model")


def _configuration(model: PreTrainedModel) -> object:
    """The configuration as JSON values, without incidental settings and without settings at their default.

    Defaults are left out because new releases of transformers add settings.
    """
    values = json.loads(json.dumps(model.config.to_dict(), default=str))
    defaults = json.loads(json.dumps(type(model.config)().to_dict(), default=str))
    absent = object()
    return {
        key: value
        for key, value in values.items()
        if key not in _INCIDENTAL and not key.startswith("_") and value != defaults.get(key, absent)
    }
