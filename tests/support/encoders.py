"""Tiny encoders without an output layer for tokens, saved as sentence-transformers saves them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import BLOCKS, HEADS, HIDDEN, INTERMEDIATE, POSITIONS, VOCAB, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

TYPE = "sentence_transformers.models"


def tiny_encoder(seed: int = 0, **settings: object) -> BertModel:
    """A random BertModel in evaluation mode; biases and norms are random too."""
    config = BertConfig(
        vocab_size=VOCAB,
        pad_token_id=1,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        max_position_embeddings=POSITIONS,
        initializer_range=0.1,
        **settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertModel(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def wrapping_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer, which puts <s> before and </s> after a text as encoders' tokenizers do."""
    tokenizer = tiny_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


def save_sentence_encoder(
    folder: Path, pooling: dict[str, object] | None = None, dense: int = 0, seed: int = 0
) -> Path:
    """Save a tiny sentence encoder in `folder`: the mean over the tokens unless `pooling` says otherwise, and a Dense
    layer with `dense` outputs unless that is 0.
    """
    tiny_encoder(seed).save_pretrained(folder)
    wrapping_tokenizer().save_pretrained(folder)
    steps = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    (folder / "1_Pooling").mkdir()
    settings = {"word_embedding_dimension": HIDDEN, **(pooling or {"pooling_mode_mean_tokens": True})}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    if dense:
        steps.insert(2, ("2_Dense", "Dense"))
        (folder / "2_Dense").mkdir()
        activation = {"activation_function": "torch.nn.modules.activation.Tanh"}
        config = {"in_features": HIDDEN, "out_features": dense, "bias": True, **activation}
        (folder / "2_Dense" / "config.json").write_text(json.dumps(config))
        generator = torch.Generator().manual_seed(seed)
        tensors = {"linear.weight": torch.randn(dense, HIDDEN, generator=generator), "linear.bias": torch.ones(dense)}
        save_file(tensors, folder / "2_Dense" / "model.safetensors")
    entries = [{"idx": i, "name": str(i), "path": p, "type": f"{TYPE}.{t}"} for i, (p, t) in enumerate(steps)]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64, "do_lower_case": False}))
    return folder
