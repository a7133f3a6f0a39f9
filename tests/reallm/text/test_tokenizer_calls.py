"""Chat templates and tokenizers: rendered and encoded as they do it themselves, and one line for what they raise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCAB, tiny_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from reallm.errors import UserError
from reallm.text.corpus import load_text
from reallm.text.tokenizer_calls import decode_tokens, encode, render_user_message
from reallm.text.windows import check_vocabulary, cut_windows, tokenize

TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
    {"role": "tool", "content": "7", "name": "f"},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and this?"}]},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "gives x"}}]
FULL_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<s>{{ m.role }}{% if m.name %}({{ m.name }}){% endif %}: "
    "{% if m.content is string %}{{ m.content }}"
    "{% elif m.content %}{% for part in m.content %}"
    "{% if part.type == 'image' %}[image]{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}</s>{% endfor %}"
)


def error_message(call: Callable[..., object], *arguments: Any, **options: Any) -> str:
    """The message of the UserError that `call` raises, which must be one line."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def with_template(template: str) -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def test_calls_of_tools_null_content_and_parts_are_rendered_as_the_template_does(tmp_path: Path) -> None:
    tokenizer = with_template(FULL_TEMPLATE)
    text = load_text(jsonl(tmp_path / "a.jsonl", {"messages": TALK, "tools": TOOLS}, {"messages": TALK}))
    expected = [
        tokenizer.apply_chat_template(TALK, tools=tools, tokenize=True, return_dict=False) for tools in (TOOLS, None)
    ]
    assert tokenize(text, tokenizer).tolist() == expected[0] + expected[1]
    decoded = tokenizer.decode(expected[0])
    assert "gives x" in decoded and '"arguments"' in decoded and "[image]and this?" in decoded and "tool(f)" in decoded


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role\nnot supported') }}"
            "{% endif %}{{ m.content }}{% endfor %}",
            "System role not supported",
        ),
        ("{{ messages[0].content + 3 }}", "can only concatenate str"),
        ("{{ tools[0].name }}", "None has no element 0"),
        ("{{ messages[0].content.first.second }}", "has no attribute 'first'"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ nothing() }}", "'nothing' is undefined"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ],
    ids=str,
)
def test_whatever_a_template_raises_names_the_file_and_the_line(tmp_path: Path, template: str, reason: str) -> None:
    text = load_text(jsonl(tmp_path / "a.jsonl", {"text": "plain"}, {"messages": TALK[:2]}))
    message = error_message(tokenize, text, with_template(template))
    assert message.startswith(f"{tmp_path}/a.jsonl line 2: the chat template fails")
    assert reason in message


def test_a_template_that_is_not_jinja(tmp_path: Path) -> None:
    text = load_text(jsonl(tmp_path / "a.jsonl", {"messages": TALK[:2]}))
    message = error_message(tokenize, text, with_template("a\n{% for m in %}"))
    assert "chat template is not valid Jinja (line 2" in message


def test_named_templates_without_a_default(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"tool_use": "{{ messages[0].content }}"}
    text = load_text(jsonl(tmp_path / "a.jsonl", {"messages": TALK[:2]}))
    assert "no default" in error_message(tokenize, text, tokenizer)


def test_a_users_text_reaches_templates_that_expect_parts() -> None:
    parts_only = (
        "{% for m in messages %}<s>{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}"
        "{% endfor %}</s>{% endfor %}"
    )
    assert render_user_message(with_template(parts_only), "hello", "here") == "<s>hello</s>"
    assert render_user_message(with_template(FULL_TEMPLATE), " hi\nyou ", "here") == "<s>user:  hi\nyou </s>"
    assert render_user_message(with_template("<s>{{ messages[0].content | trim }}"), " hi ", "here") == "<s>hi"
    assert "leaves out" in error_message(render_user_message, with_template("<s>assistant:"), "hi", "here")
    forbidden = with_template("{{ raise_exception('never') }}")
    assert "here: the chat template fails" in error_message(render_user_message, forbidden, "hi", "here")


def test_lone_surrogates_are_found_in_their_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good \\u0000 text"}\n\n{"text": "bad \\ud83d!"}\n', encoding="utf-8")
    message = error_message(tokenize, load_text(path), tiny_tokenizer())
    assert message.startswith(f"{path} line 3: character 5 is half of a UTF-16 surrogate pair ('\\ud83d')")
    talk = [{"role": "user", "content": "\ud83d"}]
    message = error_message(tokenize, load_text(jsonl(path, {"messages": talk})), tiny_tokenizer())
    assert message.startswith(f"{path} line 1: character 10 is half")


def test_nul_bytes_empty_documents_and_a_long_line_are_text(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    (tmp_path / "a.txt").write_bytes(b"a\0b\n")
    assert tokenizer.decode(tokenize(load_text(tmp_path / "a.txt"), tokenizer)) == "a\0b\n"
    text = load_text(jsonl(tmp_path / "a.jsonl", {"text": ""}, {"text": "x" * 100_000}, {"text": ""}))
    assert tokenize(text, tokenizer).shape == (100_000 + 4,)
    assert tokenizer.decode(tokenize(text, tokenizer, chat_template=True)[:8]) == "<s>user: </s>"


class _Panics(PreTrainedTokenizerFast):
    """A tokenizer whose library crashes on the letter q, as a Rust panic does."""

    def __call__(self, text: str, **options: Any) -> Any:
        if "q" in text:
            raise type("PanicException", (BaseException,), {})("index out of bounds")
        return super().__call__(text, **options)


def test_whatever_a_tokenizer_raises_names_the_document(tmp_path: Path) -> None:
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"good": 0}, unk_token="[UNK]")))
    text = load_text(jsonl(tmp_path / "a.jsonl", {"text": "good"}, {"text": "unquestionably"}))
    message = error_message(tokenize, text, words)
    assert message.startswith(f"{tmp_path}/a.jsonl line 2: the tokenizer cannot encode this text (")
    assert "Missing [UNK] token" in message
    panics = _Panics(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    message = error_message(tokenize, text, panics)
    assert message.startswith(f"{tmp_path}/a.jsonl line 2: the tokenizer cannot encode")
    assert "index out of bounds" in message
    with pytest.raises(KeyboardInterrupt):
        encode(_interrupted, "text", "here", special_tokens=False)  # type: ignore[arg-type]


def _interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_a_slow_tokenizer_that_knows_no_token_for_a_word() -> None:
    def slow(*_: Any, **__: Any) -> dict[str, Any]:
        return {"input_ids": [1, None]}

    assert "no token for a part" in error_message(encode, slow, "ab", "here", special_tokens=False)


def test_tokens_that_cannot_be_decoded() -> None:
    class Silent:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            raise TypeError("expected str instance, NoneType found")

    message = error_message(decode_tokens, Silent(), [3])
    assert "cannot decode the model's tokens (TypeError: expected str instance" in message
    message = error_message(check_vocabulary, torch.tensor([7]), Silent(), 5, "here")
    assert message.startswith("here: the tokenizer gives the token id 7, but the model has only 5 tokens")


@pytest.mark.parametrize("nsamples", [None, 2])
def test_token_ids_beyond_the_embedding_are_refused(tmp_path: Path, nsamples: int | None) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    text = load_text(jsonl(tmp_path / "a.jsonl", {"text": "abcdefgh" * 8 + "<new>"}))
    message = error_message(cut_windows, text, tokenizer, nsamples, 5, vocabulary=VOCAB)
    assert f"the token id {VOCAB} ('<new>'), but the model has only {VOCAB} tokens" in message
    assert int(cut_windows(text, tokenizer, None, 5, vocabulary=VOCAB + 1).max()) == VOCAB
    harmless = load_text(jsonl(tmp_path / "b.jsonl", {"text": "abcdefgh" * 8}))
    assert torch.equal(
        cut_windows(harmless, tokenizer, nsamples, 5, vocabulary=VOCAB), cut_windows(harmless, tokenizer, nsamples, 5)
    )
