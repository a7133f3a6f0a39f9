"""What the shrinker cannot know: settings per model type, and the variants of some architectures.

A key is the path of a setting, with dots between the names of sub-configurations.
"""

from __future__ import annotations

from collections.abc import Mapping

from .sizes import HIDDEN, IMAGE

Settings = Mapping[str, object]

_SECTION = [2, 3, 3]
_VISION_SECTION: Settings = {"text_config.rope_parameters.mrope_section": _SECTION}

_OMNI_TOKENS: Settings = {
    name: 5 + index
    for index, name in enumerate(("vision_start_token_id", "vision_end_token_id", "audio_start_token_id"))
}
_PINPOINTS: Settings = {"image_grid_pinpoints": [[IMAGE, 2 * IMAGE], [2 * IMAGE, IMAGE]]}
_GEMMA4_VISION: Settings = {
    "vision_config": {
        "model_type": "gemma4_vision",
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "patch_size": 8,
        "pooling_kernel_size": 2,
        "position_embedding_size": 64,
    }
}
_LETTERS = {f"IMGIMG{chr(65 + i // 10)}{chr(65 + i % 10)}Z": 262 + i for i in range(64)}

SETTINGS: Mapping[str, Settings] = {
    "aria": {"projector_patch_to_query_dict": {16: 4}, "max_value_projector_patch_to_query_dict": 4},
    "bamba": {"attn_layer_indices": [1]},
    "chameleon": {"vocabulary_map": {"<image>": 261} | _LETTERS, "vocab_size": 326},
    "cohere_compass": {
        "text_config.layer_types": ["sliding_attention", "full_attention"],
        "text_config.rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": _SECTION},
            "full_attention": None,
        },
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": _SECTION},
            "full_attention": None,
        },
    },
    "dbrx": {
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 2, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_ocr2": {
        "vision_config.sam_config.downsample_channels": [32, HIDDEN],
        "text_config.mlp_layer_types": ["dense", "sparse"],
        "text_config.num_experts_per_tok": 2,
        "text_config.n_group": 1,
        "text_config.topk_group": 1,
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "deepseek_v3": {"num_hidden_layers": 3, "first_k_dense_replace": 1},
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "rope_parameters.main.partial_rotary_factor": 0.5,
        "rope_parameters.compress.partial_rotary_factor": 0.5,
        "partial_rotary_factor": 0.5,
        "qk_rope_head_dim": 8,
    },
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 48,
    },
    "dots1": {
        "num_experts_per_tok": 2,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "dots3_note": {
        "text_config.head_dim": 32,
        "text_config.per_layer_config.2.kv_lora_rank": 48,
        "audio_config.adapter_in_dim": HIDDEN,
        "audio_config.adapter_out_dim": HIDDEN,
    },
    "dots3_note_text": {"head_dim": 32, "per_layer_config.2.kv_lora_rank": 48},
    "emu3": {"vocabulary_map": {"<image>": 261} | {f"<|visual token {i:06d}|>": 262 + i for i in range(8)}},
    "ernie4_5_vl_moe": {
        "text_config.moe_intermediate_size": [48, 32],
        "text_config.rope_parameters.mrope_section": [3, 3, 2],
    },
    "esm": {"vocab_size": 261, "pad_token_id": 1, "mask_token_id": 4},
    "esmc": {"vocab_size": 261},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 32},
    "florence2": {
        "vision_config.embed_dim": [32, 32, 64, 64],
        "vision_config.num_heads": [2, 2, 4, 4],
        "vision_config.num_groups": [2, 2, 4, 4],
        "vision_config.depths": [1, 1, 1, 1],
    },
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gemma4": _GEMMA4_VISION,
    "granite4_vision": {
        "deepstack_layer_map": [[-1, 1]],
        "spatial_target_layers": [0, 0, 1, 1],
        "downsample_rate": "2/4",
        "image_grid_pinpoints": [[IMAGE, 2 * IMAGE], [2 * IMAGE, IMAGE]],
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "glm4v": {"text_config.rope_parameters.mrope_section": [2, 3, 3]},
    "hrm_text": {"num_hidden_layers": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "moe_topk": 2, "num_experts": 4},
    "hunyuan_vl": {"text_config.head_dim": 16, "text_config.rope_parameters.mrope_section": [2, 2, 2, 2]},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2},
    "janus": {"vq_config.channel_multiplier": [1, 1], "vq_config.num_patches": 16},
    "led": {"attention_window": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_hidden_layers": 4},
    "llama4": {"vision_config.intermediate_size": 4 * HIDDEN},
    "llava_next": _PINPOINTS,
    "llava_next_video": _PINPOINTS,
    "llava_onevision": _PINPOINTS,
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "ministral": {"head_dim": 16},
    "mistral4": {"qk_head_dim": 32, "head_dim": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16},
    "mllama-image": {"vision_config.vision_output_dim": 2 * HIDDEN},
    "mobilebert": {"intra_bottleneck_size": 32, "true_hidden_size": 32, "embedding_size": 32},
    "molmo2": {
        "vision_config.image_size": [IMAGE, IMAGE],
        "vision_config.patch_size": 8,
        "vision_config.num_position_embeddings": 16,
        "adapter_config.vision_feature_layer": [1, 0],
        "text_config.additional_vocab_size": 16,
    },
    "muse_glimmer": {"out_hidden_size": 4 * HIDDEN},
    "muse_spark": {
        "out_hidden_size": 4 * HIDDEN,
        "audio_config.num_hidden_layers": 4,
        "audio_config.hidden_sizes": [32, 32, 64, 64],
        "audio_config.depths": [1, 1, 1, 1],
    },
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 2, "mamba_head_dim": 32, "mamba_num_heads": 4},
    "qwen4_exp": {
        "text_config.indexer_n_heads": 4,
        "text_config.indexer_kv_heads": 1,
        "text_config.indexer_head_dim": 16,
        "text_config.indexer_budget": 64,
        "text_config.indexer_compress_ratio": 4,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "qwen2_5_omni_thinker": {**_VISION_SECTION, **_OMNI_TOKENS},
    "qwen3_omni_moe_thinker": _OMNI_TOKENS,
    "qwen2_5_vl": _VISION_SECTION,
    "qwen2_vl": _VISION_SECTION,
    "paddleocr_vl": _VISION_SECTION,
    "glm46v": _VISION_SECTION,
    "glmga": _VISION_SECTION,
    "glm_ocr": _VISION_SECTION,
    "glm4v_moe": {"text_config.rope_parameters.mrope_section": [1, 1, 2]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [16, HIDDEN - 16],
        "attn_layers": ["local", "lsh"],
        "num_hidden_layers": 2,
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
        "num_buckets": 4,
        "is_decoder": True,
    },
    "reformer-encoder": {"is_decoder": False},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "t5gemma2": {"encoder.mm_tokens_per_image": 4},
    "step3p7": {
        "text_config.sliding_window": 32,
        "text_config.layer_types": ["full_attention", "sliding_attention"],
        "text_config.rope_parameters.sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "unlimited_ocr": {"vision_config.sam_config.downsample_channels": [32, HIDDEN]},
    "vipllava": {"vision_feature_layer": [-2, -1, 0, 1, 2]},
    "vibevoice_asr": {
        f"{part}_tokenizer_encoder_config.{name}": value
        for part in ("acoustic", "semantic")
        for name, value in (("num_filters", 2), ("depths", [1] * 7))
    },
    "xlstm": {"hidden_size": 2 * HIDDEN, "embedding_dim": 2 * HIDDEN},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 32,
    },
    "zamba2": {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 32},
}
"""Model type, or name of a case -> settings, applied after shrinking."""
