"""Windows of tokens cut from a text.

Evaluation: the documents are joined by blank lines, tokenised once and cut into consecutive windows that do not
overlap; the last partial window is dropped (the usual WikiText-2 protocol; GPTQ, arXiv 2210.17323). Calibration:
`nsamples` windows drawn with a seed, which do not overlap either.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reallm.errors import UserError

from .corpus import Text
from .readers import Document

NO_LIMIT = 10**9
"""Longest window where neither the model nor the tokenizer sets a limit; such tokenizers report about 10^30."""


def cut_windows(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    nsamples: int | None,
    seqlen: int,
    seed: int = 0,
    chat_template: bool = False,
    max_positions: int | None = None,
) -> Tensor:
    """Cut `text` into token windows that do not overlap, int64 [windows, seqlen].

    With `nsamples` None, all consecutive windows from the start of the text. Otherwise `nsamples` windows drawn with
    `seed`, spread over the text and in its order, or fewer where the text is too short (see `shortage`).
    `chat_template` wraps each plain document as a user's message; conversations always go through the template.
    `max_positions` is the model's longest context in tokens; None takes the tokenizer's. Raises UserError for a text
    shorter than one window and for a `seqlen` out of range.
    """
    limit = max_positions or tokenizer.model_max_length or NO_LIMIT
    if not 1 <= seqlen <= limit:
        raise UserError(f"--seqlen {seqlen}: this model takes 1 to {limit} tokens; choose a length within that range")
    if nsamples is not None and nsamples < 1:
        raise UserError(f"--nsamples {nsamples}: expected at least 1 window")
    tokens = tokenize(text, tokenizer, chat_template)
    count = len(tokens) // seqlen
    if count == 0:
        what = f"{text.description}: {len(tokens)} tokens found, {seqlen} needed for one window"
        raise UserError(f"{what}; give a longer --text or a smaller --seqlen")
    if nsamples is None:
        return tokens[: count * seqlen].reshape(count, seqlen)
    count = min(count, nsamples)
    generator = torch.Generator().manual_seed(seed)
    gaps, _ = torch.randint(len(tokens) - count * seqlen + 1, (count,), generator=generator).sort()
    starts = gaps + seqlen * torch.arange(count)  # sorted gaps keep neighbours at least seqlen apart
    return tokens[starts[:, None] + torch.arange(seqlen)]


def shortage(windows: Tensor, nsamples: int | None) -> str | None:
    """The note for the user when `cut_windows` gave fewer than `nsamples` windows, else None."""
    if nsamples is None or len(windows) == nsamples:
        return None
    return f"the text has only {len(windows)} windows of {windows.shape[1]} tokens, not {nsamples}: all are used"


def tokenize(text: Text, tokenizer: PreTrainedTokenizerBase, chat_template: bool = False) -> Tensor:
    """Token ids of the whole text, int64 [tokens]; special tokens that the tokenizer adds at the ends appear once.

    Raises UserError when a chat template is needed and the tokenizer has none.
    """
    templated = chat_template or any(isinstance(document, tuple) for document in text.documents)
    if templated and not tokenizer.chat_template:
        raise UserError(f"{text.description}: the tokenizer has no chat template; use plain text without it")
    parts = [_render(document, tokenizer, chat_template) for document in text.documents]
    joined = ("" if templated else "\n\n").join(parts)  # a template adds its own separators and BOS
    ids = tokenizer(joined, add_special_tokens=not templated, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _render(document: Document, tokenizer: PreTrainedTokenizerBase, chat_template: bool) -> str:
    """The document as the model is to see it, through the chat template where it is a conversation or asked for."""
    if isinstance(document, str) and not chat_template:
        return document
    conversation = [{"role": "user", "content": document}] if isinstance(document, str) else list(document)
    rendered: str = tokenizer.apply_chat_template(conversation, tokenize=False)
    return rendered
