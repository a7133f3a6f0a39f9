"""Calls of a tokenizer and of its chat template. Whatever they raise becomes a UserError of one line.

Templates and tokenizers come with the model. A template may refuse a role, read a key that a message lacks, or not be
valid Jinja; a tokenizer may refuse a character. The message names the document and, where it is known, the character.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from reallm.errors import UserError, raised_by_library

from .documents import Message


def encode(tokenizer: PreTrainedTokenizerBase, text: str, where: str, *, special_tokens: bool) -> list[int]:
    """Token ids of `text`, with the special tokens of the ends if `special_tokens` is true.

    Raises UserError, naming the text as `where`, if the tokenizer cannot encode it.
    """
    try:
        encoded = tokenizer(text, add_special_tokens=special_tokens, return_attention_mask=False, verbose=False)
        ids: list[int] = encoded["input_ids"]
    except BaseException as error:  # the tokenizers library raises bare Exception, and panics
        if not raised_by_library(error):
            raise
        raise _encoding_error(text, where, error) from error
    if None in ids:  # a slow tokenizer without an unknown token
        raise UserError(f"{where}: the tokenizer has no token for a part of the text, and no unknown token; remove it")
    return ids


def decode_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
    """The text of token ids. Raises UserError if the tokenizer cannot decode them."""
    try:
        text: str = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
    except Exception as error:  # a slow tokenizer raises what its Python code raises
        raise UserError(
            f"the tokenizer cannot decode the model's tokens ({_reason(error)}); give the model's own tokenizer files"
        ) from error
    return text


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    where: str,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    generation_prompt: bool = False,
) -> str:
    """A conversation as text, exactly as `tokenizer.apply_chat_template` renders it.

    `generation_prompt` adds the beginning of an answer. Raises UserError, naming the conversation as `where`, if the
    tokenizer has no chat template, or if the template refuses the conversation or is damaged.
    """
    if not tokenizer.chat_template:
        raise UserError(f"{where}: the tokenizer has no chat template; use plain text without it")
    try:
        rendered: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=None if tools is None else [dict(tool) for tool in tools],
            tokenize=False,
            add_generation_prompt=generation_prompt,
        )
    except TemplateSyntaxError as error:
        raise UserError(
            f"the tokenizer's chat template is not valid Jinja (line {error.lineno}: {_reason(error)}); get the "
            "tokenizer's files again, or use plain text without it"
        ) from error
    except Exception as error:  # a template can raise anything that Python can
        raise UserError(
            f"{where}: the chat template fails on this conversation ({_reason(error)}); change or remove the "
            "conversation, or use plain text"
        ) from error
    return rendered


def render_user_message(
    tokenizer: PreTrainedTokenizerBase, text: str, where: str, *, generation_prompt: bool = False
) -> str:
    """`text` as the message of a user, in the chat template.

    Templates of models that read images expect a list of parts and may skip a string; they get a list. Raises UserError
    as `render_chat` does.
    """
    failure = None
    for content in (text, [{"type": "text", "text": text}]):
        try:
            message = {"role": "user", "content": content}
            rendered = render_chat(tokenizer, [message], where, generation_prompt=generation_prompt)
        except UserError as error:
            failure = failure or error
            continue
        if "".join(text.split()) in "".join(rendered.split()):
            return rendered
    raise failure or UserError(
        f"{where}: the chat template leaves out the user's message; use plain text without the template"
    )


def _encoding_error(text: str, where: str, error: BaseException) -> UserError:
    """The error for a text that the tokenizer cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError as surrogate:
        what = f"character {surrogate.start + 1} is half of a UTF-16 surrogate pair ({text[surrogate.start]!r})"
        return UserError(f"{where}: {what}; expected valid Unicode: remove the character")
    return UserError(
        f"{where}: the tokenizer cannot encode this text ({_reason(error)}); change or remove the text, or give the "
        "model's own tokenizer files"
    )


def _reason(error: BaseException) -> str:
    """The message of `error` on one line, after the name of its type."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}" if str(error) else type(error).__name__
