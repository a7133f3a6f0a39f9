"""Windows of tokens cut from a text.

The documents are joined by blank lines and tokenised once. For evaluation, the text is cut into consecutive windows
that do not overlap, and the last partial window is dropped (the usual WikiText-2 protocol; GPTQ, arXiv 2210.17323). For
calibration, `nsamples` windows are drawn at random; these do not overlap either.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reallm.errors import UserError

from .corpus import Text
from .readers import Document

NO_LIMIT = 10**9
"""Longest window if neither the model nor the tokenizer sets a limit; tokenizers without a limit report about 10^30."""


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

    With `nsamples` None, these are all consecutive windows from the start of the text. Otherwise `nsamples` windows are
    drawn at random with `seed` and returned in the order of the text; they are fewer if the text is too short (see
    `shortage`). `chat_template` wraps each plain document as a user's message; conversations always go through the
    template. `max_positions` is the model's longest context in tokens; if None, the tokenizer's limit is used. Raises
    UserError for a text shorter than one window and for a `seqlen` out of range.
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
    """A note for the user if `cut_windows` returned fewer than `nsamples` windows, else None."""
    if nsamples is None or len(windows) == nsamples:
        return None
    return f"the text has only {len(windows)} windows of {windows.shape[1]} tokens, not {nsamples}: all are used"


def tokenize(text: Text, tokenizer: PreTrainedTokenizerBase, chat_template: bool = False) -> Tensor:
    """Tokenise the whole text at once: int64 [tokens]. Special tokens that the tokenizer adds at the ends appear once.

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
    """The text of a document, rendered by the chat template if it is a conversation or `chat_template` is true."""
    if isinstance(document, str) and not chat_template:
        return document
    conversation = [{"role": "user", "content": document}] if isinstance(document, str) else list(document)
    rendered: str = tokenizer.apply_chat_template(conversation, tokenize=False)
    return rendered
