"""What a model's embeddings and positions can hold: the largest token id and the longest context."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

STRETCHED_ROPE = ("linear", "dynamic", "yarn")
"""Rotary embeddings that extend the context to `factor` times the original one (as vLLM counts it). Of others (llama3,
longrope), `max_position_embeddings` is the extended context."""
LOCAL_LAYERS = frozenset(
    {"sliding_attention", "chunked_attention", "window_attention", "linear_attention", "conv", "mlp", "moe"}
)
"""Kinds of layers (`layer_types`) whose result does not depend on how long the text is."""
MAX_OFFSET = 8
"""A table of positions has at most this many rows more than the model has positions (OPT has 2)."""


def vocabulary_size(model: PreTrainedModel) -> int | None:
    """Number of token ids that `model` can both read and predict, which every id must be below; None if unknown.

    This is the number of rows of the embedding, or of the output layer where that has fewer (Llama 3.2 Vision).
    """
    rows = [_rows(layer) for layer in (model.get_input_embeddings, model.get_output_embeddings)]
    return min((count for count in rows if count is not None), default=None)


def _rows(layer: Callable[[], nn.Module | None]) -> int | None:
    """Number of tokens of an embedding or output layer; None if the model has none or it is of another kind."""
    try:
        module = layer()
    except (NotImplementedError, AttributeError):
        return None
    if isinstance(module, nn.Embedding):
        return module.num_embeddings
    if isinstance(module, nn.Linear):
        return module.out_features
    weight = getattr(module, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, torch.Tensor) and weight.ndim == 2 else None


def max_positions(model: PreTrainedModel) -> int | None:
    """The longest context of `model` in tokens; None where nothing limits it.

    Counts the scaling of rotary embeddings. A model whose layers all have a sliding window, linear biases (ALiBi) or no
    positions has no limit, unless its positions are rows of a table.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", getattr(config, "max_seq_len", None))  # MPT's table of biases
    if not isinstance(limit, int) or limit < 1:
        return None
    for name, module in model.named_modules():
        rows = module.num_embeddings if isinstance(module, nn.Embedding) and "position" in name else 0
        if limit <= rows <= limit + MAX_OFFSET:
            skipped = 0 if rows > limit or module.padding_idx is None else int(module.padding_idx) + 1
            return limit - skipped  # RoBERTa: the first position comes after padding_idx
    if getattr(config, "alibi", False) or _is_local(config):
        return None
    return max(limit, _stretched(config, limit))


def _is_local(config: PretrainedConfig) -> bool:
    """Whether every layer sees only the last tokens."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return set(kinds) <= LOCAL_LAYERS
    return bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True) is not False


def _stretched(config: PretrainedConfig, limit: int) -> int:
    """The context of a scaled rotary embedding; `limit` for others, and where each kind of layer has its own."""
    rope: Mapping[str, Any] | None = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(rope, Mapping) or rope.get("rope_type", rope.get("type")) not in STRETCHED_ROPE:
        return limit
    original, factor = rope.get("original_max_position_embeddings") or limit, rope.get("factor") or 1.0
    return int(original * factor)
