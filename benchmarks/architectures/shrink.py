"""Making a configuration of transformers small by the names of its settings.

All parts of a model get the same width, so that the sizes that one part has to know of another agree. A list with one
entry per layer keeps one layer of each kind.
"""

from __future__ import annotations

import re
from typing import Any

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 4, 2, 16
LAYERS, MAX_LAYERS, EXPERTS, POSITIONS, VOCAB = 2, 6, 4, 256, 261
IMAGE, PATCH = 32, 8

_NUMBERS: tuple[tuple[str, int], ...] = (
    (r"type_vocab_size|num_labels", 0),
    (r"encoder_hash_byte_group_vocab|num_embeddings|codebook_size", 64),
    (r"num_blocks", LAYERS),
    (r"(.*_)?out_channels?|nemo_conv_channels|base_channels|latent_channels|output_channels|num_filters", 32),
    (r"(.*_)?vocab_size(_per_layer_input)?|(src|tgt)_vocab_size|vocab_offset", VOCAB),
    (r"hidden_size_per_layer_input", 16),
    (r"moe_(.*_)?intermediate_size|expert_ffn_hidden_size|shared_expert_intermediate_size|share_expert_dim", 48),
    (r"(.*_)?intermediate_size(_mlp)?|(.*_)?ffn_dim|ffn_hidden_size|d_ff|dim_ff|dff|n_inner|d_inner|mlp_dim", INTERMEDIATE),
    (r"feed_forward_size", INTERMEDIATE),
    (r"index_n_heads|index_head_dim|index_topk", -1),
    (r"n_groups|mamba_n_?groups", 2),
    (r"(.*_)?(lora_rank|lowrank)|dt_rank|(mamba_)?dt_rank|time_step_rank|laurel_rank|adapter_rank|embedding_rank", 32),
    (r"rotary_dim|emb_rope_dim", 8),
    (r"qk_head_dim|mamba_(d_head|headdim|head_dim)", 32),
    (r"mamba_d_ssm", 128),
    (r"(.*_)?(head_dim|dim_head|headdim|d_head)|d_kv|kv_channels|attention_head_size|query_pre_attn_scalar", HEAD_DIM),
    (r"(.*_)?num_key_value_heads|(.*_)?num_kv_heads|kv_n_heads|num_query_groups", KV_HEADS),
    (r"(.*_)?(num_)?(attention_heads|key_heads|value_heads|heads|n_heads|n_head)(_global)?|(.*_)?n_heads?", HEADS),
    (r"(.*_)?num_(hidden_|decoder_|encoder_|global_)?layers(_per_stack)?|n_layers?|depth|(encoder|decoder)_layers", LAYERS),
    (r"(.*_)?(num_)?(local_)?experts|n_routed_experts|moe_num_experts|zero_expert_num", EXPERTS),
    (r"(num_experts_per_tok(en)?|moe_top_?k|top_?k_experts|moe_k|num_selected_experts)", 2),
    (r"n_group|topk_group|num_expert_groups?", 1),
    (r"(.*_)?max_(.*_)?position(_embedding)?s|n_positions|n_ctx|max_seq_len|model_max_length|context_length", POSITIONS),
    (r"max_(source|target)_positions|max_position_embeddings|original_max_position_embeddings|seq_length", POSITIONS),
    (r"(.*_)?image_size|resolution|crop_size", IMAGE),
    (r"sliding_window(_size)?|attention_window_size|window_size|attention_chunk_size|local_attention", 32),
    (r"(.*_)?(hidden_size|d_model|n_embd|embedding_size|embed_dim|embd_pdim|hidden_dim|projection_dim)(_global)?", HIDDEN),
    (r"(.*_)?(embedding_dim|output_dim|out_dim|adapter_in_dim|adapter_input_size|adapter_out_dim|emb_dim|emb_size|word_embed_proj_dim|lru_width|projector_.*dim)", HIDDEN),
    (r"dim|d_latents|pooler_output_size|prediction_head_size|dim_model_base", HIDDEN),
    (r"(mamba_)?d_state|ssm_state_size|state_size|mamba_d_state", 16),
    (r"(mamba_)?chunk_size|block_size", 16),
)
_RULES = tuple((re.compile(pattern), value) for pattern, value in _NUMBERS)
_LAYER_INDEX = re.compile(r".*(ind(ex|ic)e?s|layer_ids|idxs|_layers)$")


def shrink(values: dict[str, Any], tokens: dict[int, int] | None = None) -> dict[str, Any]:
    """A copy of a configuration's `values` (as of to_dict) with small sizes; sub-configurations are shrunk as well."""
    tokens = {} if tokens is None else tokens
    values = {key: value for key, value in values.items() if key not in ("transformers_version", "dtype", "quantization_config")}
    layers = _layers(values)
    kept = _kept_layers(values, layers)
    result: dict[str, Any] = {}
    for key, value in values.items():
        if key in ("id2label", "label2id", "task_specific_params"):
            continue
        if key == "per_layer_config" and isinstance(value, dict):
            result[key] = _layer_settings(value, kept)
        elif isinstance(value, dict) and not all(isinstance(name, str) for name in value):
            result[key] = value
        elif isinstance(value, dict):
            result[key] = shrink(value, tokens) if key.endswith("config") or "model_type" in value else _rope(key, value)
        elif isinstance(value, list):
            result[key] = _list(key, value, layers, kept)
        elif isinstance(value, int) and not isinstance(value, bool):
            result[key] = _number(key, value, tokens, len(kept))
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
    lists = [v for v in values.values() if isinstance(v, list) and len(v) == layers and all(isinstance(x, str) for x in v)]
    if not lists:
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
            result[name] = _number(name, entry, {}, LAYERS)
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


def _number(key: str, value: int, tokens: dict[int, int], layers: int) -> int:
    if key.endswith(("_token_id", "_token_index")) or key in ("im_start_id", "im_end_id", "im_newline_id"):
        return _token(key, value, tokens)
    if key == "patch_size":
        return PATCH if value > PATCH else value
    for pattern, small in _RULES:
        if pattern.fullmatch(key):
            if small <= 0:
                return value
            if small == LAYERS and "layers" in key + "layers" and pattern is _LAYER_RULE:
                return layers
            return min(value, small)
    return value


_LAYER_RULE = next(pattern for pattern, value in _RULES if pattern.fullmatch("num_hidden_layers"))


def _token(key: str, value: int, tokens: dict[int, int]) -> int:
    fixed = {"bos": 0, "pad": 1, "eos": 2, "forced_eos": 2, "decoder_start": 0, "forced_bos": 0, "mask": 4, "sep": 2}
    if (name := key.removesuffix("_token_id")) in fixed:
        return fixed[name]
    if value < 0:
        return value
    return tokens.setdefault(value, VOCAB + len(tokens))
