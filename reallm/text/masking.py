"""The tokens of a window that a language model has to predict, and the inputs that it is given instead of them.

A causal model predicts every token after the first of a window from the tokens before it. A masked model (an encoder)
predicts a random share MASK_SHARE of the tokens from all others; in the input, the mask token replaces each of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reallm.errors import UserError
from reallm.models.limits import vocabulary_size

MASK_SHARE = 0.15
"""Share of the tokens that are masked (BERT, arXiv 1810.04805)."""


@dataclass(frozen=True)
class ScoredWindow:
    """One window: what the model reads, and what it has to predict."""

    inputs: Tensor
    """Token ids that the model reads, int64 [1, seqlen]."""
    positions: Tensor
    """Positions of the logits that are scored, int64 [P]."""
    targets: Tensor
    """Id of the token to be predicted at each position, int64 [P]."""


def mask_token_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, label: str) -> int | None:
    """Id of the mask token of an encoder; None for a model that generates.

    Raises UserError, naming the model as `label`, for an encoder whose tokenizer has no mask token, or one that the
    model does not have.
    """
    if model.can_generate():
        return None
    mask: int | None = tokenizer.mask_token_id
    if mask is None:
        raise UserError(f"{label} neither generates nor has a mask token; expected a causal or a masked language model")
    vocabulary = vocabulary_size(model)
    if vocabulary is not None and mask >= vocabulary:
        raise UserError(
            f"{label}: the mask token has the id {mask}, but the model has only {vocabulary} tokens; the "
            "tokenizer belongs to another model: give the model's own tokenizer files"
        )
    return mask


def causal_window(window: Tensor) -> ScoredWindow:
    """Score every token after the first of `window` [seqlen], predicted from those before it."""
    return ScoredWindow(window[None], torch.arange(window.numel() - 1), window[1:])


def mask_window(window: Tensor, mask_token: int, seed: int) -> ScoredWindow:
    """Mask a random share MASK_SHARE of the tokens of `window` [seqlen], at least one, and score the masked tokens."""
    generator = torch.Generator().manual_seed(seed)
    count = max(1, round(MASK_SHARE * window.numel()))
    positions = torch.randperm(window.numel(), generator=generator)[:count].sort().values
    inputs = window.clone()
    inputs[positions] = mask_token
    return ScoredWindow(inputs[None], positions, window[positions])


def mask_windows(windows: Tensor, mask_token: int, seed: int) -> tuple[Tensor, Tensor]:
    """Mask each token of `windows` [n, seqlen] with probability MASK_SHARE, and always the first token of every window.

    Returns the masked windows and where they are masked (bool), both [n, seqlen]. Unlike `mask_window`,
    this may mask a different number of tokens in each window. Calibration allows that, because its statistics are
    averages over all tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    masked = torch.rand(windows.shape, generator=generator) < MASK_SHARE
    masked[:, 0] = True
    return windows.masked_fill(masked, mask_token), masked
