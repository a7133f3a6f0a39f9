"""Windows of tokens cut from a text.

The documents are joined by blank lines and tokenised once. For evaluation, the text is cut into consecutive windows
that do not overlap, and the last partial window is dropped (the usual WikiText-2 protocol; GPTQ, arXiv 2210.17323). For
calibration, `nsamples` windows are drawn at random; these do not overlap either.
"""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reallm.errors import UserError

from .corpus import Text
from .documents import Conversation, Document
from .tokenizer_calls import decode_tokens, encode, render_chat, render_user_message

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
    vocabulary: int | None = None,
) -> Tensor:
    """Cut `text` into token windows that do not overlap, int64 [windows, seqlen].

    With `nsamples` None, these are all consecutive windows from the start of the text. Otherwise `nsamples` windows are
    drawn at random with `seed` and returned in the order of the text; they are fewer if the text is too short (see
    `shortage`). `chat_template` wraps each plain document as a user's message; conversations always go through the
    template. `max_positions` is the model's longest context in tokens; if None, the tokenizer's limit is used.
    `vocabulary` is the number of tokens that the model has; if None, token ids are not checked. Raises UserError
    for a text shorter than one window, a `seqlen` out of range, a token that the model does not have, and a document
    that the tokenizer or its chat template refuses.
    """
    check_seqlen(seqlen, max_positions or tokenizer.model_max_length)
    if nsamples is not None and nsamples < 1:
        raise UserError(f"--nsamples {nsamples}: expected at least 1 window")
    tokens = tokenize(text, tokenizer, chat_template)
    count = len(tokens) // seqlen
    if count == 0:
        what = f"{text.description}: {len(tokens)} tokens found, {seqlen} needed for one window"
        raise UserError(f"{what}; give a longer --text or a smaller --seqlen")
    check_vocabulary(tokens, tokenizer, vocabulary, text.description)
    if nsamples is None:
        return tokens[: count * seqlen].reshape(count, seqlen)
    count = min(count, nsamples)
    generator = torch.Generator().manual_seed(seed)
    gaps, _ = torch.randint(len(tokens) - count * seqlen + 1, (count,), generator=generator).sort()
    starts = gaps + seqlen * torch.arange(count)  # sorted gaps keep neighbours at least seqlen apart
    return tokens[starts[:, None] + torch.arange(seqlen)]


def check_seqlen(seqlen: int, limit: int | None) -> None:
    """Raise UserError if `seqlen` is not a length of 1 to `limit` tokens; nothing limits it if that is None or 0."""
    limit = limit or NO_LIMIT
    if not 1 <= seqlen <= limit:
        raise UserError(f"--seqlen {seqlen}: this model takes 1 to {limit} tokens; choose a length within that range")


def shortage(windows: Tensor, nsamples: int | None) -> str | None:
    """A note for the user if `cut_windows` returned fewer than `nsamples` windows, else None."""
    if nsamples is None or len(windows) == nsamples:
        return None
    return f"the text has only {len(windows)} windows of {windows.shape[1]} tokens, not {nsamples}: all are used"


def tokenize(text: Text, tokenizer: PreTrainedTokenizerBase, chat_template: bool = False) -> Tensor:
    """Tokenise the whole text at once: int64 [tokens]. Special tokens that the tokenizer adds at the ends appear once.

    Raises UserError, naming the document, when a chat template is needed and the tokenizer has none, when the template
    refuses a conversation, and when the tokenizer cannot encode a document.
    """
    templated = chat_template or any(isinstance(document, Conversation) for document in text.documents)
    if templated and not tokenizer.chat_template:
        raise UserError(f"{text.description}: the tokenizer has no chat template; use plain text without it")
    parts = [
        _render(document, tokenizer, chat_template, text.place(index)) for index, document in enumerate(text.documents)
    ]
    joined = ("" if templated else "\n\n").join(parts)  # a template adds its own separators and BOS
    try:
        ids = encode(tokenizer, joined, text.description, special_tokens=not templated)
    except UserError:
        for index, part in enumerate(parts):  # find the document that is to blame
            encode(tokenizer, part, text.place(index), special_tokens=not templated)
        raise
    return torch.tensor(ids, dtype=torch.int64)


def check_vocabulary(
    tokens: Tensor, tokenizer: PreTrainedTokenizerBase, vocabulary: int | None, description: str
) -> None:
    """Raise UserError if a token id, int64 of any shape, is not below `vocabulary`, the model's number of tokens.

    With `vocabulary` None nothing is checked. `description` names the text in the message.
    """
    if vocabulary is None or not tokens.numel() or int(tokens.max()) < vocabulary:
        return
    found, shown = int(tokens.max()), ""
    with suppress(UserError):
        shown = f" ({decode_tokens(tokenizer, [found])!r})"
    raise UserError(
        f"{description}: the tokenizer gives the token id {found}{shown}, but the model has only {vocabulary} tokens; "
        "the tokenizer belongs to another model: give the model's own tokenizer files"
    )


def _render(document: Document, tokenizer: PreTrainedTokenizerBase, chat_template: bool, where: str) -> str:
    """The text of a document, rendered by the chat template if it is a conversation or `chat_template` is true."""
    if isinstance(document, Conversation):
        return render_chat(tokenizer, document.messages, where, tools=document.tools)
    return render_user_message(tokenizer, document, where) if chat_template else document
