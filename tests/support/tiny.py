"""Tiny random models, one per architecture that reallm is tested on, created without a download.

Sizes are awkward on purpose: hidden 48 and intermediate 80 are not powers of two, the vocabulary of 261 is odd (256
bytes and 5 special tokens), and three heads of 16 share one key-value head where the architecture allows it. All models
have two blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM as CausalLM
from transformers import AutoModelForMaskedLM as MaskedLM
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    RobertaConfig,
)

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
VOCAB = 256 + len(SPECIAL)
HIDDEN, INTERMEDIATE, HEADS, HEAD_DIM, BLOCKS, EXPERTS, POSITIONS = 48, 80, 3, 16, 2, 3, 256
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + ': ' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
)
_TOKENS = {"vocab_size": VOCAB, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
_LLAMA = _TOKENS | {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
_GEMMA = _LLAMA | {"query_pre_attn_scalar": HEAD_DIM, "sliding_window": 32, "tie_word_embeddings": True}

_CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_LLAMA),
    "llama-tied": lambda: LlamaConfig(**_LLAMA | {"tie_word_embeddings": True}),
    "mistral": lambda: MistralConfig(**_LLAMA, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**_LLAMA),
    "qwen3": lambda: Qwen3Config(**_LLAMA | {"tie_word_embeddings": True}),
    "gemma": lambda: GemmaConfig(**_LLAMA | {"tie_word_embeddings": True}),
    "gemma2": lambda: Gemma2Config(**_GEMMA),
    "gemma3": lambda: Gemma3TextConfig(**_GEMMA),
    "phi3": lambda: Phi3Config(**_LLAMA),
    "opt": lambda: OPTConfig(
        **_TOKENS,
        hidden_size=HIDDEN,
        ffn_dim=INTERMEDIATE,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        max_position_embeddings=POSITIONS,
        word_embed_proj_dim=HIDDEN,
        init_std=0.1,
    ),
    "gpt2": lambda: GPT2Config(
        **_TOKENS,
        n_embd=HIDDEN,
        n_inner=INTERMEDIATE,
        n_layer=BLOCKS,
        n_head=HEADS,
        n_positions=POSITIONS,
        initializer_range=0.1,
    ),
    "mixtral": lambda: MixtralConfig(**_LLAMA, num_local_experts=EXPERTS, num_experts_per_tok=2, sliding_window=None),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_LLAMA, num_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=40, mlp_only_layers=[]
    ),
    "roberta": lambda: RobertaConfig(
        **_TOKENS,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        max_position_embeddings=POSITIONS + 2,
        type_vocab_size=1,
        initializer_range=0.1,
    ),
}
ARCHITECTURES = tuple(_CONFIGS)


def tiny_model(
    architecture: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    settings: Mapping[str, object] | None = None,
) -> PreTrainedModel:
    """A random model of `architecture` (one of ARCHITECTURES) in evaluation mode; one seed gives one model.

    `settings` override values of its configuration. Biases and norm weights are random as well, so that a test notices
    when one is lost.
    """
    config = _CONFIGS[architecture]()
    if settings:
        config = type(config)(**config.to_dict() | dict(settings))
    auto = MaskedLM if architecture == "roberta" else CausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = auto.from_config(config)
        with torch.no_grad():
            for _, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with the special tokens and then one token per byte, and a chat template."""
    vocab = {token: i for i, token in enumerate((*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=POSITIONS,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def save_tiny(
    architecture: str,
    folder: Path | str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "50GB",
) -> Path:
    """Save `tiny_model` and tokenizer in `folder`, created if needed; a small `max_shard_size` makes many shards."""
    folder = Path(folder)
    tiny_model(architecture, seed, dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return folder
