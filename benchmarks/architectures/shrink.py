"""Making a configuration of transformers small by the names of its settings.

All parts of a model get the same width, so that the sizes that one part has to know of another agree. A list with one
entry per layer keeps one layer of each kind.
"""

from __future__ import annotations

import re
from typing import Any

from .sizes import HEAD_DIM, LAYERS, MAX_LAYERS, POSITIONS, small_number

_LEFT_OUT = frozenset({"dtype", "quantization_config", "id2label", "label2id", "task_specific_params"})
_LAYER_INDEX = re.compile(r".*(ind(ex|ic)e?s|layer_ids|idxs|_layers)$")


def shrink(values: dict[str, Any], tokens: dict[int, int] | None = None) -> dict[str, Any]:
    """A copy of a configuration's `values` (as of to_dict) with small sizes; sub-configurations are shrunk as well."""
    tokens = {} if tokens is None else tokens
    values = {key: value for key, value in values.items() if key not in _LEFT_OUT}
    layers = _layers(values)
    kept = _kept_layers(values, layers)
    result: dict[str, Any] = {}
    for key, value in values.items():
        if key == "per_layer_config" and isinstance(value, dict):
            result[key] = _layer_settings(value, kept)
        elif isinstance(value, dict) and not all(isinstance(name, str) for name in value):
            result[key] = value
        elif isinstance(value, dict):
            result[key] = (
                shrink(value, tokens) if key.endswith("config") or "model_type" in value else _rope(key, value)
            )
        elif isinstance(value, list):
            result[key] = _list(key, value, layers, kept)
        elif isinstance(value, int) and not isinstance(value, bool):
            result[key] = small_number(key, value, tokens, len(kept))
        else:
            result[key] = value
    _equal_heads(values, result)
    return result


def _equal_heads(values: dict[str, Any], small: dict[str, Any]) -> None:
    """Keep as many heads of keys and values as of queries where the model has as many."""
    for key in ("num_key_value_heads", "num_kv_heads", "num_query_groups"):
        heads = values.get("num_attention_heads", values.get("num_heads"))
        if isinstance(values.get(key), int) and values[key] == heads:
            small[key] = small.get("num_attention_heads", small.get("num_heads"))


def _layer_settings(value: dict[Any, Any], kept: list[int]) -> dict[str, Any]:
    """The settings that single layers override, under the new numbers of the layers; their heads are twice as wide."""
    old = {int(layer): changes for layer, changes in value.items()}
    result = {}
    for index, layer in enumerate(kept):
        if layer in old:
            small = shrink(old[layer], {})
            result[str(index)] = small | ({"head_dim": 2 * HEAD_DIM} if "head_dim" in small else {})
    return result


def _layers(values: dict[str, Any]) -> int:
    names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "depth")
    return next((values[name] for name in names if isinstance(values.get(name), int)), 0)


def _kept_layers(values: dict[str, Any], layers: int) -> list[int]:
    """Indices of the layers to keep: one of each kind, at least LAYERS."""
    lists = [
        v for v in values.values() if isinstance(v, list) and len(v) == layers and all(isinstance(x, str) for x in v)
    ]
    if not lists or not layers:
        return list(range(LAYERS))
    first: dict[tuple[str, ...], int] = {}
    for index, kinds in enumerate(zip(*lists, strict=True)):
        first.setdefault(kinds, index)
    kept = sorted(first.values())[:MAX_LAYERS]
    rest = (index for index in range(layers) if index not in kept)
    while len(kept) < min(LAYERS, layers):
        kept.append(next(rest))
    return sorted(kept)


def _rope(key: str, value: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, entry in value.items():
        if isinstance(entry, dict):
            result[name] = _rope(name, entry)
        elif name == "mrope_section":
            result[name] = [2, 3, 3]
        elif name == "original_max_position_embeddings":
            result[name] = POSITIONS
        elif isinstance(entry, int) and not isinstance(entry, bool) and "rope" not in key:
            result[name] = small_number(name, entry, {}, LAYERS)
        else:
            result[name] = entry
    return result


def _list(key: str, value: list[Any], layers: int, kept: list[int]) -> list[Any]:
    if layers > 4 and len(value) == layers:
        return [value[index] for index in kept]
    if value and all(isinstance(x, int) for x in value) and _LAYER_INDEX.match(key):
        return sorted({min(x, len(kept) - 1) for x in value})
    if key == "mrope_section":
        return [2, 3, 3]
    return value
