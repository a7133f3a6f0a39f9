"""Special tokens around a text, such as [CLS] and [SEP], and windows of a text with them, as an encoder expects."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .tokenizer_calls import encode


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that `tokenizer` puts before and after a text."""
    word, full = (encode(tokenizer, "a", "the letter a", special_tokens=added) for added in (False, True))
    start = next((i for i in range(len(full)) if full[i : i + len(word)] == word), len(full))
    return full[:start], full[start + len(word) :]


def with_special_tokens(windows: Tensor, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    """`windows` [n, seqlen] with their first and last tokens replaced by the special tokens around a text.

    A tokenizer that adds none, or a window with no room for them, leaves the windows as they are.
    """
    if tokenizer is None:
        return windows
    before, after = added_tokens(tokenizer)
    if len(before) + len(after) >= windows.shape[1]:
        return windows
    result = windows.clone()
    result[:, : len(before)] = torch.tensor(before, dtype=windows.dtype)
    result[:, windows.shape[1] - len(after) :] = torch.tensor(after, dtype=windows.dtype)
    return result
