"""What a text consists of: plain documents and conversations, and the checks of one row of a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reallm.errors import UserError

Message = Mapping[str, Any]
"""One turn of a conversation: {"role": ..., "content": ...} and whatever else the chat template reads, such as
"tool_calls". The content is a string, null, or a list of parts such as {"type": "text", "text": ...}."""

TEXT_COLUMN, CHAT_COLUMN, TOOLS_COLUMN = "text", "messages", "tools"


@dataclass(frozen=True)
class Conversation:
    """Messages that still need a chat template, and the tools that the template may describe.

    >>> Conversation(({"role": "user", "content": "Hello"},)).tools is None
    True
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    """JSON schemas of the functions that the assistant may call."""

    def to_json(self) -> object:
        """JSON values for a digest: the list of messages, or an object with messages and tools."""
        messages = [dict(message) for message in self.messages]
        return messages if self.tools is None else {CHAT_COLUMN: messages, TOOLS_COLUMN: list(self.tools)}

    @property
    def has_media(self) -> bool:
        """Whether a message has a part that is not text, such as an image."""
        contents = [message.get("content") for message in self.messages]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        return any(isinstance(part, Mapping) and part["type"] != "text" for part in parts)

    @property
    def characters(self) -> int:
        """Approximate length of the rendered conversation, in characters."""
        return sum(len(str(message.get("content"))) for message in self.messages)


Document = str | Conversation
"""Plain text, or a conversation."""


def document_of(row: object, where: str) -> Document:
    """The document in one row of a file or data set.

    Raises UserError, naming the row as `where`, if it has neither text nor messages, or messages that no chat template
    can render.
    """
    if isinstance(row, Mapping):
        text, messages = row.get(TEXT_COLUMN), row.get(CHAT_COLUMN)
        if isinstance(text, str):
            return text
        if isinstance(messages, list) and messages:
            for number, message in enumerate(messages, start=1):
                _check_message(message, f"{where}: message {number}")
            return Conversation(tuple(messages), _tools(row.get(TOOLS_COLUMN), where))
    content = type(row).__name__
    if isinstance(row, Mapping):
        content = ", ".join(f"{key} ({type(value).__name__})" for key, value in row.items())
    expected = f'expected "{TEXT_COLUMN}": a string, or "{CHAT_COLUMN}": a list of {{"role", "content"}}'
    raise UserError(f"{where} holds {content or 'nothing'}; {expected}")


def _check_message(message: object, where: str) -> None:
    """Raise UserError if `message` is not an object with a role and with content of a kind that templates know."""
    if not isinstance(message, Mapping):
        raise UserError(f'{where} is {type(message).__name__}; expected an object with "role" and "content"')
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise UserError(f'{where} has no role; expected "role": a string such as "user" or "assistant"')
    if isinstance(content, str | Mapping) or (content is None and len(message) > 1):
        return
    if not isinstance(content, list):
        found = "no content" if content is None else f"content of type {type(content).__name__}"
        raise UserError(f'{where} has {found}; expected "content": a string, null or a list of parts')
    if not all(isinstance(part, str) or (isinstance(part, Mapping) and "type" in part) for part in content):
        raise UserError(f'{where} has a part without a type; expected parts such as {{"type": "text", "text": ...}}')


def _tools(tools: object, where: str) -> tuple[Mapping[str, Any], ...] | None:
    """The tools of a row, a list or (as many data sets store them) its JSON. Raises UserError for anything else."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{where}: {TOOLS_COLUMN} is a string that is not JSON ({error}); expected a list"
            ) from None
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UserError(f"{where}: {TOOLS_COLUMN} is not a list of objects; expected the JSON schema of each function")
    return tuple(tools)


def without_nulls(value: Any) -> Any:
    """`value` without the null fields that a table adds to every object that lacks them (Parquet, Arrow)."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None or key == "content"}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
