"""config.json in the words of mlx_lm, which computes with its own defaults where it does not find a setting.

mlx_lm reads the rotary settings of most models under the names of transformers 4, and ignores settings that its model
files do not know. So only the models listed here are accepted, each with the settings under which mlx_lm was seen to
compute the logits that transformers computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reallm.errors import UserError

_YARN_KEYS = frozenset({"factor", "original_max_position_embeddings", "beta_fast", "beta_slow"})
_LLAMA3_KEYS = frozenset({"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"})
SCALING_KEYS = {
    "default": frozenset[str](),
    "linear": frozenset({"factor"}),
    "yarn": _YARN_KEYS,
    "llama3": _LLAMA3_KEYS,
}
"""Type of rotary scaling -> the settings of it that mlx_lm reads as transformers does.

It takes the long factors of "longrope" for short texts too, so that type is not here.
"""
_ALWAYS_NEEDED = frozenset({"factor", "original_max_position_embeddings"})
"""Settings for which transformers and mlx_lm have different defaults."""


@dataclass(frozen=True)
class KnownModel:
    """What mlx_lm computes for a type of model."""

    activations: tuple[str, ...] = ("silu", "swish")
    scalings: tuple[str, ...] = ("default", "linear", "yarn", "llama3")
    partial_rotation: bool = False
    """Whether only a part of each head may be rotated."""


_GELU = ("gelu_pytorch_tanh", "gelu")
MODELS: Mapping[str, KnownModel] = {
    "gemma": KnownModel(_GELU, ("default",)),
    "gemma2": KnownModel(_GELU[:1], ("default",)),
    "llama": KnownModel(),
    "mistral": KnownModel(),
    "phi3": KnownModel(scalings=("default",), partial_rotation=True),
    "qwen2": KnownModel(),
    "qwen3": KnownModel(),
}
"""model_type -> what mlx_lm computes for it."""


def mlx_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings to add to config.json for mlx_lm. Raises UserError for a model that it would compute differently.

    >>> mlx_settings({"model_type": "llama", "hidden_act": "silu", "rope_parameters": {"rope_theta": 500000.0}})
    {'rope_theta': 500000.0}
    """
    model_type = config.get("model_type")
    known = MODELS.get(str(model_type))
    if known is None:
        raise UserError(
            f"config.json: model_type {model_type} cannot be exported for mlx; expected one of {', '.join(MODELS)}"
        )
    activation = config.get("hidden_activation") or config.get("hidden_act")
    if activation not in known.activations:
        raise UserError(
            f"config.json: mlx_lm computes {known.activations[0]} in {model_type}, not {activation}; it cannot be "
            "exported for mlx"
        )
    return _rotary_settings(known, config, f"config.json: mlx_lm computes {model_type}")


def window_note(config: Mapping[str, Any]) -> tuple[str, ...]:
    """A remark if the model has a sliding window: mlx_lm ignores that of every model in MODELS."""
    window = config.get("sliding_window")
    layers = config.get("layer_types")
    slides = "sliding_attention" in layers if isinstance(layers, list) else config.get("use_sliding_window", True)
    if not window or not slides:
        return ()
    return (f"mlx_lm attends to all earlier tokens, the model only to {window}: longer texts have other logits in MLX",)


def _rotary_settings(known: KnownModel, config: Mapping[str, Any], what: str) -> dict[str, Any]:
    settings = config.get("rope_parameters")
    if settings is None and "rope_theta" in config:  # written by transformers 4
        settings = {"rope_theta": config["rope_theta"]} | (config.get("rope_scaling") or {})
    if not isinstance(settings, Mapping) or "rope_theta" not in settings:
        raise UserError(f"{what} with one rotary embedding, but rope_parameters has no rope_theta for all layers")
    kind = settings.get("rope_type") or settings.get("type") or "default"
    part = settings.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if kind not in known.scalings:
        raise UserError(f"{what} with the rope_type {', '.join(known.scalings)}, not {kind}")
    if part not in (None, 1) and not known.partial_rotation:
        raise UserError(f"{what} without partial_rotary_factor, but it is {part}")
    scaling = {
        key: value
        for key, value in settings.items()
        if key not in ("rope_theta", "rope_type", "type", "partial_rotary_factor") and value is not None
    }
    if unread := sorted(scaling.keys() - SCALING_KEYS[kind]):
        raise UserError(f"{what} without {', '.join(unread)} of rope_parameters")
    if missing := sorted((SCALING_KEYS[kind] & _ALWAYS_NEEDED) - scaling.keys()):
        raise UserError(f"{what} with {', '.join(missing)} in rope_parameters, which is missing")
    result: dict[str, Any] = {"rope_theta": settings["rope_theta"]}
    if part is not None:
        result["partial_rotary_factor"] = part
    if kind != "default":
        result["rope_scaling"] = {"rope_type": kind, "type": kind} | scaling
    return result
