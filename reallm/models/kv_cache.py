"""What a model needs beside its weights while it decodes: the cache of keys and values, measured on a few tokens.

Nothing is taken from formulas of known architectures: a forward of PROBE_TOKENS tokens fills the model's own cache, and
what lies in it is counted. So grouped queries, latent attention, layers that share a cache and mixtures with layers
that keep none (Mamba) come out as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reallm.planner.tables.measured_table import CacheLayer

from .probe import eager_experts, probe_ids


def kv_cache(model: PreTrainedModel) -> tuple[CacheLayer, ...]:
    """Each layer's values kept a token and its window; empty for a model without a cache of keys and values."""
    if not model.can_generate():
        return ()
    training, ids = model.training, probe_ids(model)
    model.eval()
    try:
        with torch.no_grad(), eager_experts(model):
            cache = model(input_ids=ids, use_cache=True).get("past_key_values")
    finally:
        model.train(training)
    layers = getattr(cache, "layers", ())
    return tuple(found for layer in layers if (found := _layer(layer)) is not None)


def _layer(layer: Any) -> CacheLayer | None:
    kept = [t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if isinstance(t, Tensor)]
    values = sum(tensor.numel() // tensor.shape[-2] for tensor in kept if tensor.ndim == 4 and tensor.shape[-2])
    window = getattr(layer, "sliding_window", None) if getattr(layer, "is_sliding", False) else None
    return CacheLayer(values=values, window=window) if values else None


def experts_per_token(model: PreTrainedModel) -> int | None:
    """How many experts of a layer a token goes through, by the configuration; None where it does not say."""
    found = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    return found if isinstance(found, int) and found > 0 else None
