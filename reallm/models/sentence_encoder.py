"""What a sentence-transformers folder computes from an encoder's hidden states: one embedding per text.

`modules.json` lists the steps: the Transformer itself, a Pooling over the tokens and, in some models, Dense layers and
a normalisation. Texts are compared by the cosine of their embeddings, so embeddings have unit length here in any case.
A folder without `modules.json` gets the mean over the tokens, as sentence-transformers does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from reallm.errors import UserError
from reallm.kernels.storage.layout import CONFIG_FILE

from .checkpoint import read_json
from .sentence_layers import dense_layer, layer_norm

MODULES_FILE = "modules.json"
_EXTRA_FILES = (MODULES_FILE, "sentence_bert_config.json", "config_sentence_transformers.json")
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Settings of a Pooling saved by sentence-transformers before 6, in the order in which the parts are concatenated."""
_MODES = frozenset(_FLAGS.values())
_BACKBONES = frozenset(n for n in MODEL_MAPPING_NAMES.values() if isinstance(n, str) and n.endswith("Model"))
_TEXT_ENCODERS = frozenset({*MODEL_FOR_MASKED_LM_MAPPING_NAMES, *MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES})
"""Model types whose models without an output layer encode text."""


@dataclass(frozen=True)
class SentenceEncoder:
    """The steps from an encoder's hidden states to the embedding of a text."""

    modes: tuple[str, ...] = ("mean",)
    """How the tokens are pooled: names of sentence-transformers; the results of several are concatenated."""
    layers: tuple[nn.Module, ...] = ()
    """The Dense and LayerNorm steps after the pooling, in order, float32."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """The files that sentence-transformers needs beside those of the model: path inside the model's folder -> file."""

    def embed(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """The embeddings [texts, width] of unit length, float32, from hidden states [texts, tokens, hidden].

        `mask` [texts, tokens] is 1 where a token belongs to the text and 0 for padding; None where there is none.

        >>> hidden = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])
        >>> SentenceEncoder(("cls",)).embed(hidden), SentenceEncoder().embed(hidden, torch.tensor([[0, 1]]))
        (tensor([[1., 0.]]), tensor([[0., 1.]]))
        """
        hidden = hidden.float()
        weights = torch.ones(hidden.shape[:2]) if mask is None else mask
        weights = weights.to(hidden)
        result = torch.cat([_pool(hidden, weights, mode) for mode in self.modes], dim=1)
        for layer in self.layers:
            result = layer.to(result.device)(result)
        return nn.functional.normalize(result, dim=1)


def is_sentence_encoder(folder: Path) -> bool:
    """Whether `folder` is laid out as sentence-transformers saves a model."""
    return (folder / MODULES_FILE).is_file()


def read_sentence_encoder(folder: Path) -> SentenceEncoder:
    """Read the steps in `folder`; the mean over the tokens if it has no `modules.json`.

    Raises UserError for a damaged file, and for a step that would change what the embedding is and is not known here.
    """
    if not is_sentence_encoder(folder):
        return SentenceEncoder()
    path = folder / MODULES_FILE
    steps = _steps(path)
    kinds = [str(step["type"]).rpartition(".")[2] for step in steps]
    if kinds[:2] != ["Transformer", "Pooling"] or steps[0].get("path"):
        found = ", ".join(kinds) or "nothing"
        raise UserError(f"{path} lists {found}; expected a Transformer in this folder, a Pooling and then other steps")
    modes: tuple[str, ...] = ()
    layers, paths = [], [folder / name for name in _EXTRA_FILES if (folder / name).is_file()]
    for kind, step in zip(kinds[1:], steps[1:], strict=True):
        place = folder / str(step.get("path", ""))
        if not place.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{path}: the module path {step.get('path')!r} leaves the folder; get the file again")
        if kind == "Pooling":
            modes = modes or _modes(place / CONFIG_FILE)
        elif kind in ("Dense", "LayerNorm"):
            layers.append(dense_layer(place) if kind == "Dense" else layer_norm(place))
        elif kind not in ("Normalize", "Dropout"):
            raise UserError(f"{path} lists a {kind}; expected only Pooling, Dense, LayerNorm, Dropout and Normalize")
        own = sorted(place.iterdir()) if step.get("path") and place.is_dir() else []
        paths += [file for file in own if file.suffix in (".json", ".safetensors")]
    return SentenceEncoder(modes, tuple(layers), {path.relative_to(folder).as_posix(): path for path in paths})


def _steps(path: Path) -> list[Mapping[str, Any]]:
    """The entries of `modules.json`. Raises UserError unless each is an object with a type."""
    try:
        steps = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); get the file again") from None
    if isinstance(steps, list) and all(isinstance(s, dict) and isinstance(s.get("type"), str) for s in steps):
        return steps
    raise UserError(f"{path}: expected a list of modules, each with a type; get the file again")


def _modes(path: Path) -> tuple[str, ...]:
    """The pooling modes in the configuration of a Pooling. Raises UserError for an unknown one."""
    config = read_json(path)
    if "pooling_mode" in config:
        named = config["pooling_mode"]
        modes = tuple(named) if isinstance(named, list) else (named,)
    else:
        modes = tuple(mode for flag, mode in _FLAGS.items() if config.get(flag)) or ("mean",)
    if unknown := [mode for mode in modes if mode not in _MODES]:
        raise UserError(f"{path}: pooling mode {unknown[0]!r}; expected one of {', '.join(sorted(_MODES))}")
    return modes


def _pool(hidden: Tensor, weights: Tensor, mode: str) -> Tensor:
    """[texts, hidden] from hidden states [texts, tokens, hidden] and weights [texts, tokens] of 0 and 1."""
    positions = weights.cumsum(1) * weights
    if mode == "cls":
        return hidden[torch.arange(len(hidden)), weights.argmax(1)]
    if mode == "lasttoken":
        return hidden[torch.arange(len(hidden)), positions.argmax(1)]
    if mode == "max":
        return hidden.masked_fill(weights[:, :, None] == 0, -torch.inf).amax(1)
    share = positions if mode == "weightedmean" else weights
    total = (hidden * share[:, :, None]).sum(1)
    count = share.sum(1, keepdim=True).clamp_min(1e-9)
    return total / (count.sqrt() if mode == "mean_sqrt_len_tokens" else count)


def gives_embeddings(model: PreTrainedModel) -> bool:
    """Whether `model` is an encoder without an output layer for tokens, such as BertModel."""
    return is_backbone(type(model).__name__)


def is_backbone(name: str) -> bool:
    """Whether the class called `name` has no output layer for tokens."""
    return name in _BACKBONES


def encoder_class(config: PretrainedConfig, folder: Path) -> str | None:
    """The name of the class without an output layer, such as "BertModel", as which `folder` is to be loaded, if any.

    That is so for a folder of sentence-transformers, whichever class `config` names, and for an encoder of text whose
    class `config` names. A decoder without its output layer and without `modules.json` may be used in many ways, so it
    is none.
    """
    name = MODEL_MAPPING_NAMES.get(config.model_type)
    if not isinstance(name, str):
        return None
    named = isinstance(config.architectures, list) and name in config.architectures
    return name if is_sentence_encoder(folder) or (named and config.model_type in _TEXT_ENCODERS) else None


def fill_pooler(model: PreTrainedModel, missing: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Set the tensors of an encoder's pooler to zero if they are `missing` from its file: (other missing ones, notes).

    Sentence encoders use the hidden states and are often saved without the pooler, which transformers would fill with
    random values.
    """
    pooler = [name for name in missing if gives_embeddings(model) and name.startswith("pooler.")]
    for name in pooler:
        nn.init.zeros_(model.get_parameter(name))
    notes = ("the file has no pooler, which the embedding of a text does not need: it is zero",) if pooler else ()
    return [name for name in missing if name not in pooler], notes
