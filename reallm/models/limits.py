"""What a model's embeddings and positions can hold: the largest token id and the longest context."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def embedding_rows(model: PreTrainedModel) -> int | None:
    """Number of rows of the embedding of token ids, which every id must be below; None if `model` has none."""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        return None
    if isinstance(embedding, nn.Embedding):
        return embedding.num_embeddings
    weight = getattr(embedding, "weight", None)
    return None if weight is None or weight.ndim != 2 else int(weight.shape[0])


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
