"""Variants of some architectures: settings that released models of the same type differ in."""

from __future__ import annotations

from collections.abc import Mapping

from .settings import Settings

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

VARIANTS: Mapping[str, Mapping[str, Settings]] = {
    "bloom": {"postnorm": {"apply_residual_connection_post_layernorm": True}},
    "cohere": {"qknorm": {"use_qk_norm": True}},
    "deepseek_v3": {"no-q-lora": {"q_lora_rank": None}, "float32": {"dtype": "float32"}},
    "deepseek_v2": {"no-q-lora": {"q_lora_rank": None}},
    "ernie4_5_moe": {"bias": {"use_bias": True, "tie_word_embeddings": False}},
    "falcon": {
        "alibi": {"alibi": True, "bias": True},
        "new-decoder": {"new_decoder_architecture": True, "num_kv_heads": 2},
        "sequential": {"parallel_attn": False, "multi_query": False},
    },
    "gemma3": {"untied": {"tie_word_embeddings": False}},
    "gemma4_text": {
        "moe": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48},
        "shared-kv": {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "per_layer_config": {"1": {"head_dim": 32}, "3": {"head_dim": 32}},
        },
        "no-inputs-per-layer": {"hidden_size_per_layer_input": 0},
    },
    "glm4_moe": {"qknorm": {"use_qk_norm": True, "attention_bias": True}},
    "gpt2": {"float32": {"dtype": "float32"}, "untied": {"tie_word_embeddings": False}},
    "gpt_bigcode": {"many-heads": {"multi_query": False}},
    "gpt_neox": {"sequential": {"use_parallel_residual": False}},
    "granitemoehybrid": {"dense": {"num_local_experts": 0, "num_experts_per_tok": 0}},
    "llama": {
        "bias": {"attention_bias": True, "mlp_bias": True},
        "float16": {"dtype": "float16"},
        "float32": {"dtype": "float32"},
        "gqa": {"num_key_value_heads": 2},
        "mqa": {"num_key_value_heads": 1},
        "rope-llama3": {"rope_parameters": _LLAMA3_ROPE},
        "rope-yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}},
        "tied": {"tie_word_embeddings": True},
        "wide-heads": {"head_dim": 32},
    },
    "llava": {
        "mistral": {"text_config.model_type": "mistral", "text_config.num_key_value_heads": 2},
        "qwen2": {"text_config.model_type": "qwen2"},
    },
    "mamba": {"untied": {"tie_word_embeddings": False}},
    "mistral": {"no-window": {"sliding_window": None}, "tied": {"tie_word_embeddings": True}},
    "mixtral": {"tied": {"tie_word_embeddings": True}},
    "mpt": {"no-alibi": {"attn_config.alibi": False}},
    "olmo": {"clipped": {"clip_qkv": 0.2}, "tied": {"tie_word_embeddings": True}},
    "olmoe": {"clipped": {"clip_qkv": 0.2}},
    "opt": {"projected": {"word_embed_proj_dim": 32, "do_layer_norm_before": False}},
    "phi": {"qknorm": {"qk_layernorm": True, "num_key_value_heads": 2}},
    "phi3": {
        "longrope": {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 1.0,
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 128,
            },
        },
        "tied": {"tie_word_embeddings": True},
    },
    "qwen2": {
        "tied": {"tie_word_embeddings": True},
        "window": {
            "use_sliding_window": True,
            "sliding_window": 16,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    },
    "qwen2_moe": {"half-dense": {"decoder_sparse_step": 2}},
    "qwen3": {"tied": {"tie_word_embeddings": True}},
    "qwen3_5": {"tied": {"tie_word_embeddings": True, "text_config.tie_word_embeddings": True}},
    "qwen3_moe": {"half-dense": {"mlp_only_layers": [0]}},
    "qwen3_vl": {"tied": {"tie_word_embeddings": True, "text_config.tie_word_embeddings": True}},
    "stablelm": {"parallel": {"use_parallel_residual": True, "use_qkv_bias": True}, "qknorm": {"qk_layernorm": True}},
    "t5": {"gated": {"feed_forward_proj": "gated-gelu", "is_gated_act": True, "dense_act_fn": "gelu_new"}},
}
"""Name of a case -> name of the variant -> its settings; "dtype" is that of the saved weights."""
