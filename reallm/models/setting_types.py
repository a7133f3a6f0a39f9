"""Types of settings that transformers checks only when it uses them, while tokenizing or generating."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig

GENERATION_FILE = "generation_config.json"
TOKENIZER_FILE = "tokenizer_config.json"
_GENERATION_TYPES: Mapping[type, tuple[str, ...]] = {
    bool: (
        *("do_sample", "use_cache", "output_scores", "output_logits", "output_attentions", "output_hidden_states"),
        *("return_dict_in_generate", "renormalize_logits", "remove_invalid_values"),
    ),
    int: (
        *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "num_return_sequences"),
        *("top_k", "no_repeat_ngram_size"),
    ),
    float: ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty", "max_time"),
}
"""Type -> settings of generation_config.json that have it, unless they are null."""


def check_tokenizer(tokenizer: Any) -> None:
    """Raise an exception if a setting of `tokenizer` is of a wrong type, which otherwise shows at its first use."""
    limit = tokenizer.model_max_length
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit >= 1:
        raise ValueError(f"model_max_length is {limit!r}, expected a number above 0")
    ids = tokenizer("a b")["input_ids"]
    tokenizer.decode(ids)
    tokenizer.decode(ids, skip_special_tokens=True)
    if tokenizer.chat_template is not None and not isinstance(tokenizer.chat_template, str | dict):
        raise ValueError(f"chat_template is a {type(tokenizer.chat_template).__name__}, expected text")


def check_generation(config: GenerationConfig) -> None:
    """Raise an exception if a setting of `config` is of a wrong type, which otherwise shows while generating."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        value = getattr(config, name, None)
        ids = value if isinstance(value, list) else [value]
        if value is not None and not all(type(token) is int for token in ids):
            raise ValueError(f"field '{name}' is {value!r}, expected a token id or a list of them")
    for kind, names in _GENERATION_TYPES.items():
        for name in names:
            value = getattr(config, name, None)
            fits = type(value) is kind or (kind is float and type(value) is int)
            if value is not None and not fits:
                raise ValueError(f"field '{name}' is {value!r}, expected a value of type {kind.__name__}")
