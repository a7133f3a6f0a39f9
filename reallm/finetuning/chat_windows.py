"""The windows that are trained on: of plain text all tokens count, of conversations only the assistant's answers.

Conversations go through the tokenizer's chat template and stand one after another; where an answer begins and ends is
found by rendering the conversation up to it, with the template's prompt for an answer, and up to its end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from reallm.errors import UserError
from reallm.text.corpus import Text, windows
from reallm.text.readers import Message

ANSWERER = "assistant"


@dataclass(frozen=True)
class SampledWindows:
    """Windows of tokens, the names they are kept by, and which tokens count."""

    tokens: Tensor
    """Int64 [windows, seqlen]."""
    names: Tensor
    """Int64 [windows], each another."""
    scored: Tensor | None = None
    """Bool [windows, seqlen]; None for all."""

    def __getitem__(self, part: slice | Tensor) -> SampledWindows:
        return SampledWindows(self.tokens[part], self.names[part], None if self.scored is None else self.scored[part])


def sample_windows(
    text: Text, tokenizer: PreTrainedTokenizerBase, seqlen: int, max_positions: int | None
) -> SampledWindows:
    """All consecutive windows of `text`; of conversations those with an answer in them.

    Raises UserError for a text too short, a seqlen out of range, a missing chat template, or no answer.
    """
    conversations = [document for document in text.documents if isinstance(document, tuple)]
    if not conversations:
        tokens = windows(text, tokenizer, None, seqlen, max_positions=max_positions)
        return SampledWindows(tokens, torch.arange(len(tokens)))
    if len(conversations) < len(text.documents):
        raise UserError(f"{text.description} mixes rows of text and of messages; expected one kind: split the file")
    if not tokenizer.chat_template:
        raise UserError(f"{text.description}: the tokenizer has no chat template; use plain text, or an instruct model")
    if max_positions is not None and seqlen > max_positions:
        raise UserError(f"--seqlen {seqlen}: this model takes 1 to {max_positions} tokens; choose a length within that")
    rows = [answer_tokens(conversation, tokenizer, text.description) for conversation in conversations]
    tokens, scored = (torch.cat(parts) for parts in zip(*rows, strict=True))
    if not bool(scored.any()):
        raise UserError(
            f"{text.description} has no usable row: none of its {len(rows)} conversations holds a message of the "
            f'{ANSWERER} after another\'s; expected {{"role": "{ANSWERER}", "content": ...}}'
        )
    count = -(-len(tokens) // seqlen)
    missing = (0, count * seqlen - len(tokens))
    tokens = pad(tokens, missing, value=_padding(tokenizer)).view(count, seqlen)
    scored = pad(scored, missing).view(count, seqlen)
    useful = scored[:, 1:].any(1)  # no position of a window predicts its first token
    return SampledWindows(tokens[useful], torch.arange(count)[useful], scored[useful])


def _padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to fill the last window with, after all that counts."""
    found = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in found if isinstance(token, int)), 0)


def answer_tokens(
    conversation: tuple[Message, ...], tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[Tensor, Tensor]:
    """Token ids int64 [n] of a conversation, and bool [n]: which lie in an answer, its end mark included.

    Raises UserError where the template does not render a conversation as the beginning of a longer one.
    """
    messages = [dict(message) for message in conversation]

    def rendered(count: int, prompt: bool) -> str:
        result: str = tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)
        return result

    ends: list[tuple[str, bool]] = []
    for index, message in enumerate(messages):
        if index and message["role"] == ANSWERER and message["content"].strip():
            ends += [(rendered(index, True), False), (rendered(index + 1, False), True)]
    ends.append((rendered(len(messages), False), False))
    ids: list[int] = []
    scored: list[bool] = []
    done = ""
    for upto, answer in ends:
        if not upto.startswith(done):
            raise UserError(f"{where}: the chat template changes what came before, so answers cannot be told apart")
        found = tokenizer(upto[len(done) :], add_special_tokens=False, return_attention_mask=False)["input_ids"]
        ids += found
        scored += [answer] * len(found)
        done = upto
    return torch.tensor(ids, dtype=torch.int64), torch.tensor(scored, dtype=torch.bool)
