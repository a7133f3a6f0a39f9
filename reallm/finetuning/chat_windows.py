"""Windows of tokens to train on. In plain text every token is scored; in conversations only the assistant's answers.

Conversations are rendered by the tokenizer's chat template and concatenated. To find where an answer begins and ends,
the conversation is rendered twice: up to the answer, with the template's generation prompt, and up to its end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from reallm.errors import UserError
from reallm.text.corpus import Text
from reallm.text.documents import Conversation, Message
from reallm.text.tokenizer_calls import encode, render_chat
from reallm.text.windows import check_vocabulary, cut_windows

ANSWERER = "assistant"


@dataclass(frozen=True)
class SampledWindows:
    """Windows of tokens, their identifiers, and which tokens are scored."""

    tokens: Tensor
    """Token ids, int64 [windows, seqlen]."""
    window_ids: Tensor
    """A unique number for each window of the text, int64 [windows]: the key under which teacher states are cached."""
    scored: Tensor | None = None
    """Whether the loss includes the prediction of each token, bool [windows, seqlen]; None if it includes all."""

    def __getitem__(self, part: slice | Tensor) -> SampledWindows:
        scored = None if self.scored is None else self.scored[part]
        return SampledWindows(self.tokens[part], self.window_ids[part], scored)


def sample_windows(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    seqlen: int,
    max_positions: int | None,
    vocabulary: int | None = None,
) -> SampledWindows:
    """Cut `text` into consecutive windows of `seqlen` tokens; of conversations, keep those that contain part of an
    answer.

    Raises UserError if the text is too short, `seqlen` exceeds `max_positions`, the chat template is missing or refuses
    a conversation, a token id is not below `vocabulary` (the model's number of tokens), or there is no answer.
    """
    conversations = [document for document in text.documents if isinstance(document, Conversation)]
    if not conversations:
        tokens = cut_windows(text, tokenizer, None, seqlen, max_positions=max_positions, vocabulary=vocabulary)
        return SampledWindows(tokens, torch.arange(len(tokens)))
    if len(conversations) < len(text.documents):
        raise UserError(
            f"{text.description} mixes rows of text with rows of messages; expected one kind: split the file"
        )
    if not tokenizer.chat_template:
        raise UserError(f"{text.description}: the tokenizer has no chat template; use plain text, or an instruct model")
    if max_positions is not None and seqlen > max_positions:
        raise UserError(
            f"--seqlen {seqlen}: this model takes 1 to {max_positions} tokens; choose a length in that range"
        )
    rows = [answer_tokens(each, tokenizer, text.place(index)) for index, each in enumerate(conversations)]
    tokens, scored = (torch.cat(parts) for parts in zip(*rows, strict=True))
    if not bool(scored.any()):
        raise UserError(
            f"{text.description} has no usable row: none of its {len(rows)} conversations has a message of the "
            f'{ANSWERER} after another message; expected {{"role": "{ANSWERER}", "content": ...}}'
        )
    check_vocabulary(tokens, tokenizer, vocabulary, text.description)
    count = -(-len(tokens) // seqlen)
    padding = (0, count * seqlen - len(tokens))
    tokens = pad(tokens, padding, value=_padding_token(tokenizer, vocabulary)).view(count, seqlen)
    scored = pad(scored, padding).view(count, seqlen)
    has_answer = scored[:, 1:].any(1)  # the first token of a window is never predicted
    return SampledWindows(tokens[has_answer], torch.arange(count)[has_answer], scored[has_answer])


def _padding_token(tokenizer: PreTrainedTokenizerBase, vocabulary: int | None) -> int:
    """The token that fills the rest of the last window; it is not scored. The model has `vocabulary` tokens."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in candidates if isinstance(token, int) and token < (vocabulary or token + 1)), 0)


def _is_answer(message: Message) -> bool:
    """Whether `message` is one that the model has to learn to write: text or calls of tools."""
    content = message.get("content")
    empty = not content.strip() if isinstance(content, str) else not content
    return message["role"] == ANSWERER and not (empty and not message.get("tool_calls"))


def answer_tokens(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[Tensor, Tensor]:
    """Token ids of a conversation, int64 [n], and whether each belongs to an answer, bool [n].

    The token that marks the end of an answer counts as part of the answer. `where` names the conversation in the error
    message. Raises UserError if the template refuses the conversation, or does not render its first messages as a
    prefix of the whole.
    """
    messages = conversation.messages

    def render(count: int, generation_prompt: bool) -> str:
        return render_chat(
            tokenizer, messages[:count], where, tools=conversation.tools, generation_prompt=generation_prompt
        )

    prefixes: list[tuple[str, bool]] = []  # growing prefixes; whether the text that each adds is an answer
    for index, message in enumerate(messages):
        if index and _is_answer(message):
            prefixes += [(render(index, True), False), (render(index + 1, False), True)]
    prefixes.append((render(len(messages), False), False))
    ids: list[int] = []
    scored: list[bool] = []
    previous = ""
    for prefix, ends_in_answer in prefixes:
        if not prefix.startswith(previous):
            raise UserError(
                f"{where}: the chat template rewrites earlier messages, so answers cannot be located; expected a "
                "template that only appends; use plain text, or another tokenizer"
            )
        part = encode(tokenizer, prefix[len(previous) :], where, special_tokens=False)
        ids += part
        scored += [ends_in_answer] * len(part)
        previous = prefix
    return torch.tensor(ids, dtype=torch.int64), torch.tensor(scored, dtype=torch.bool)
