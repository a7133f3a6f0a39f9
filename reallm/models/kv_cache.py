"""The size of a model's KV cache, measured on a few tokens, and the number of experts per token.

The size does not come from formulas for known architectures: a forward pass of PROBE_TOKENS tokens fills the model's KV
cache, and the values in it are counted. So the size is also right for grouped queries, latent attention, layers that
share a cache, and hybrid models in which some layers have no cache (Mamba).
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from reallm.errors import UserError
from reallm.planner.tables.measured_table import CacheLayer

from .probe import eager_experts, probe_ids


def kv_cache(model: PreTrainedModel) -> tuple[CacheLayer, ...]:
    """Each layer's number of KV cache values per token and its attention window; empty for a model without KV cache.

    Raises UserError for a model that cannot run with its cache.
    """
    if not model.can_generate():
        return ()
    training, ids = model.training, probe_ids(model)
    model.eval()
    try:
        with torch.no_grad(), eager_experts(model):
            cache = model(input_ids=ids, use_cache=True).get("past_key_values")
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        name, version = type(model).__name__, transformers.__version__
        what = f"{name} of transformers {version} cannot run with its cache, which it generates with"
        raise UserError(f"{what}: {reason}") from error
    finally:
        model.train(training)
    layers = getattr(cache, "layers", ())
    return tuple(record for layer in layers if (record := _layer(layer)) is not None)


def _layer(layer: Any) -> CacheLayer | None:
    """The record of one `layer` of transformers' cache; None if that has no keys and values [1, heads, tokens, dim]."""
    cached = [t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if isinstance(t, Tensor)]
    values = sum(tensor.numel() // tensor.shape[-2] for tensor in cached if tensor.ndim == 4 and tensor.shape[-2])
    window = getattr(layer, "sliding_window", None) if getattr(layer, "is_sliding", False) else None
    return CacheLayer(values=values, window=window) if values else None


def experts_per_token(model: PreTrainedModel) -> int | None:
    """Number of experts that process each token in a layer; None where the model's configuration does not say."""
    count = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    return count if isinstance(count, int) and count > 0 else None
