"""Training a classification head over an encoder: in full, or with LoRA adapters of PEFT over a compressed one."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.encoder_task import CLASSES, Sentences
from reallm.models.sentence_encoder import SentenceEncoder
from reallm.runtime.packed import Packed

RANK, EPOCHS, BATCH, MAX_TOKENS = 8, 6, 16, 48
LEARNING_RATES = {"full": 2e-4, "lora": 2e-3}
"""Peak learning rates of AdamW; that of adapters is the best of 1e-3, 2e-3 and 4e-3 for the dense model, seed 0."""
PROBE_PENALTY = 1e-3
"""Weight of the squared norm in the logistic regression."""
TARGETS = ["query", "key", "value", "dense"]
"""The linear layers of BERT, by the ends of their names."""
Starts = Mapping[str, tuple[Tensor, Tensor]]
"""Linear layer -> the adapter's initial (A [rank, in], B [out, rank])."""


def classifier(folder: Path, seed: int) -> PreTrainedModel:
    """A model with a new head, drawn with `seed`, over the encoder in `folder`, which may be an artifact."""
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(CLASSES), dtype=torch.float32)


def with_adapters(model: PreTrainedModel, starts: Starts | None) -> nn.Module:
    """`model` with a LoRA adapter on every linear layer, from zero or from `starts`; everything else but the head is
    frozen.
    """
    result: nn.Module = get_peft_model(
        model, LoraConfig(task_type="SEQ_CLS", r=RANK, lora_alpha=RANK, target_modules=TARGETS)
    )
    layers = {name.partition("base_model.model.bert.")[2]: layer for name, layer in result.named_modules()}
    for name, (left, right) in (starts or {}).items():
        layers[name].lora_A["default"].weight.data.copy_(left)
        layers[name].lora_B["default"].weight.data.copy_(right)
    return result


def adapter_starts(
    dense: nn.Module, compressed: nn.Module, fisher: Mapping[str, Tensor] | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """The best factors of rank RANK for what compression changed in every packed layer.

    Without `fisher` they minimise the squared error (LoftQ, arXiv 2310.08659, with one iteration); with the diagonal
    Fisher information of every layer, the error weighted by the means of its rows and columns (LQ-LoRA).
    """
    result = {}
    for name, layer in compressed.named_modules():
        if not isinstance(layer, Packed) or not isinstance(layer, nn.Module) or name.startswith("embeddings"):
            continue
        error = dense.get_parameter(f"{name}.weight").detach().float() - layer.dense(torch.float32)
        rows, cols = torch.ones(len(error), 1), torch.ones(1, error.shape[1])
        if fisher is not None:
            F = fisher[name].clamp_min(1e-20)
            rows, cols = F.mean(1, keepdim=True).sqrt(), F.mean(0, keepdim=True).sqrt()
        U, S, V = torch.linalg.svd(rows * error * cols, full_matrices=False)
        root = S[:RANK].sqrt()
        result[name] = (root[:, None] * V[:RANK] / cols, U[:, :RANK] * root / rows)
    return result


def train(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Sentences, learning_rate: float, seed: int
) -> None:
    """Train all parameters that require gradients for EPOCHS passes, with warm-up and linear decay, without dropout."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    order = [i for epoch in range(EPOCHS) for i in _shuffled(len(data.texts), 1000 * seed + epoch)]
    steps = len(order) // BATCH
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
    )
    model.eval()
    for step in range(steps):
        batch = order[step * BATCH : (step + 1) * BATCH]
        labels = torch.tensor([data.labels[i] for i in batch])
        loss = nn.functional.cross_entropy(model(**_tokens(tokenizer, [data.texts[i] for i in batch])).logits, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.inference_mode()
def accuracy(model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Sentences) -> float:
    """The share of sentences whose class `model` finds, 0 to 1."""
    order = sorted(range(len(data.texts)), key=lambda i: len(data.texts[i]))
    right = 0
    for start in range(0, len(order), 32):
        batch = order[start : start + 32]
        found = model(**_tokens(tokenizer, [data.texts[i] for i in batch])).logits.argmax(1)
        right += int((found == torch.tensor([data.labels[i] for i in batch])).sum())
    return right / len(order)


def probe_accuracy(
    model: PreTrainedModel,
    encoder: SentenceEncoder,
    tokenizer: PreTrainedTokenizerBase,
    train_data: Sentences,
    test_data: Sentences,
) -> float:
    """The accuracy of a logistic regression on the embeddings of the frozen `model`; nothing in it is random."""
    features = [_embeddings(model, encoder, tokenizer, data) for data in (train_data, test_data)]
    labels = [torch.tensor(data.labels) for data in (train_data, test_data)]
    layer = nn.Linear(features[0].shape[1], len(CLASSES))
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(layer(features[0]), labels[0])
        loss = loss + PROBE_PENALTY * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return float((layer(features[1]).argmax(1) == labels[1]).float().mean())


@torch.no_grad()
def _embeddings(
    model: PreTrainedModel, encoder: SentenceEncoder, tokenizer: PreTrainedTokenizerBase, data: Sentences
) -> Tensor:
    """The embeddings [sentences, width] of unit length."""
    parts = []
    for start in range(0, len(data.texts), 32):
        tokens = _tokens(tokenizer, list(data.texts[start : start + 32]))
        parts.append(encoder.embed(model(**tokens).last_hidden_state, tokens["attention_mask"]))
    return torch.cat(parts)


def _shuffled(count: int, seed: int) -> list[int]:
    return random.Random(seed).sample(range(count), count)


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Mapping[str, Tensor]:
    tokens: Mapping[str, Tensor] = tokenizer(
        texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    )
    return tokens
