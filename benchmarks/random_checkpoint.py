"""Checkpoints of random weights with the shapes of a released model, for measurements of memory and speed.

Weights are normal with standard deviation STD, norms are one, and the tokenizer is that of the model given. Tensors are
written one after another, so a checkpoint may be larger than the memory.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from reallm.kernels.storage.safetensors_writer import write_weights

STD = 0.02
LLAMA_3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}


def write_checkpoint(folder: Path, settings: dict[str, object], tokenizer: Path, **changes: object) -> None:
    """Write a bf16 checkpoint with the shapes of `settings`, changed by `changes`, to `folder`; `tokenizer` is a GGUF
    file whose tokenizer is stored beside it.
    """
    settings = {**settings, **changes}
    config = AutoConfig.for_model(**settings)
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = revert_weight_conversion(model, dict(model.state_dict()))
    tensors = {
        name: ("BF16", tuple(tensor.shape), lambda name=name, shape=tensor.shape: _values(name, shape))
        for name, tensor in names.items()
    }
    write_weights(folder, tensors)
    _write_settings(folder, config, type(model).__name__, tokenizer)


def _values(name: str, shape: torch.Size) -> memoryview:
    """The bytes of the tensor called `name`, the same on every run."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    values = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator).mul_(STD)
    return memoryview(values.bfloat16().reshape(-1).view(torch.uint8).numpy())


def _write_settings(folder: Path, config: PretrainedConfig, architecture: str, tokenizer: Path) -> None:
    config.architectures = [architecture]
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer.parent, gguf_file=tokenizer.name).save_pretrained(folder)
