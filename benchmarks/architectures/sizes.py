"""Small values for the settings of a configuration, by name."""

from __future__ import annotations

import re

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 4, 2, 16
LAYERS, MAX_LAYERS, EXPERTS, POSITIONS, VOCAB = 2, 6, 4, 256, 261
IMAGE, PATCH = 32, 8

_SIZES: tuple[tuple[int | None, str], ...] = (
    (None, "type_vocab_size|num_labels"),
    (2, "index_n_heads|o_groups"),
    (32, "index_head_dim"),
    (16, "index_topk"),
    (64, "encoder_hash_byte_group_vocab|num_embeddings|codebook_size"),
    (LAYERS, "num_blocks"),
    (32, "(.*_)?out_channels?|nemo_conv_channels|base_channels|latent_channels|output_channels|num_filters"),
    (VOCAB, "(.*_)?vocab_size(_per_layer_input)?|vocab_offset"),
    (16, "hidden_size_per_layer_input"),
    (48, "moe_(.*_)?intermediate_size|expert_ffn_hidden_size|shared_expert_intermediate_size|share_expert_dim"),
    (INTERMEDIATE, "(.*_)?intermediate_size(_mlp)?|(.*_)?ffn_dim|ffn_hidden_size|feed_forward_size"),
    (INTERMEDIATE, "d_ff|dim_ff|dff|n_inner|d_inner|mlp_dim"),
    (2, "n_groups|mamba_n_?groups"),
    (32, "(.*_)?(lora_rank|lowrank)|dt_rank|(mamba_)?dt_rank|time_step_rank|laurel_rank|adapter_rank|embedding_rank"),
    (8, "rotary_dim|emb_rope_dim"),
    (32, "qk_head_dim|mamba_(d_head|headdim|head_dim)"),
    (128, "mamba_d_ssm"),
    (HEAD_DIM, "(.*_)?(head_dim|dim_head|headdim|d_head)|d_kv|kv_channels|attention_head_size|query_pre_attn_scalar"),
    (KV_HEADS, "(.*_)?num_key_value_heads|(.*_)?num_kv_heads|kv_n_heads|num_query_groups"),
    (HEADS, "(.*_)?(num_)?(attention_heads|key_heads|value_heads|heads|n_heads|n_head)(_global)?|(.*_)?n_heads?"),
    (EXPERTS, "(.*_)?(num_)?(local_)?experts|n_routed_experts|moe_num_experts|zero_expert_num"),
    (2, "num_experts_per_tok(en)?|moe_top_?k|top_?k_experts|moe_k|num_selected_experts"),
    (1, "n_group|topk_group|num_expert_groups?"),
    (POSITIONS, "(.*_)?max_(.*_)?position(_embedding)?s|original_max_position_embeddings"),
    (POSITIONS, "n_positions|n_ctx|max_seq_len|model_max_length|context_length|seq_length"),
    (IMAGE, "(.*_)?image_size|resolution|crop_size"),
    (32, "sliding_window(_size)?|attention_window_size|window_size|attention_chunk_size|local_attention"),
    (HIDDEN, "(.*_)?(hidden_size|d_model|n_embd|embedding_size|embed_dim|hidden_dim|projection_dim)(_global)?"),
    (HIDDEN, "(.*_)?(embedding_dim|output_dim|out_dim|emb_dim|emb_size|lru_width|word_embed_proj_dim|projector_.*dim)"),
    (HIDDEN, "(.*_)?(adapter_in_dim|adapter_input_size|adapter_out_dim)"),
    (HIDDEN, "dim|d_latents|pooler_output_size|prediction_head_size|dim_model_base"),
    (16, "(mamba_)?d_state|ssm_state_size|state_size|(mamba_)?chunk_size|block_size"),
    (PATCH, "patch_size"),
)
"""(largest value, names of settings); None keeps the value."""
_LAYER_COUNT = re.compile(
    "(.*_)?num_(hidden_|decoder_|encoder_|global_)?layers(_per_stack)?|n_layers?|depth|((encoder|decoder)_)?layers"
)
_RULES = tuple((re.compile(names), size) for size, names in _SIZES)
_TOKENS = {"bos": 0, "pad": 1, "eos": 2, "forced_eos": 2, "decoder_start": 0, "forced_bos": 0, "mask": 4, "sep": 2}
"""Special tokens -> their ids in the sweep's tokenizer."""


def small_number(key: str, value: int, tokens: dict[int, int], layers: int) -> int:
    """A small value in place of `value` for the setting `key`; `layers` is the number of layers that are kept.

    Ids of tokens that the tokenizer does not have, such as that of a picture, get the next free ids; `tokens` collects
    them: id in the released model -> id here.
    """
    if key.endswith(("_token_id", "_token_index")) or key in ("im_start_id", "im_end_id", "im_newline_id"):
        if (name := key.removesuffix("_token_id")) in _TOKENS:
            return _TOKENS[name]
        return value if value < 0 else tokens.setdefault(value, VOCAB + len(tokens))
    if _LAYER_COUNT.fullmatch(key):
        return min(value, layers)
    size = next((size for names, size in _RULES if names.fullmatch(key)), None)
    return value if size is None else min(value, size)
