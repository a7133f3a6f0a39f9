"""In a conversation the tokens of the answers are scored, including their end marks, and no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import VOCAB, tiny_tokenizer

from reallm.errors import UserError
from reallm.finetuning.chat_windows import answer_tokens, sample_windows
from reallm.text.corpus import load_text
from reallm.text.documents import Conversation

TALK = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


def rows(path: Path, *documents: Any) -> str:
    path.write_text("\n".join(json.dumps(document) for document in documents), encoding="utf-8")
    return str(path)


def test_only_answers_are_scored() -> None:
    tokenizer = tiny_tokenizer()
    ids, scored = answer_tokens(Conversation(tuple(TALK)), tokenizer, "here")
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(TALK, tokenize=False)
    text = tokenizer.decode(ids[scored])
    assert "two" in text and "four" in text and "one" not in text and "three" not in text
    for answer in ("two", "four"):  # the prompt for an answer is given, not learnt
        end = tokenizer.decode(ids).index(answer)
        assert not scored[len(tokenizer(tokenizer.decode(ids)[:end], add_special_tokens=False)["input_ids"]) - 1]


def test_windows_without_an_answer_are_left_out(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    talk = [{"role": "user", "content": "x" * 200}, {"role": "assistant", "content": "y"}]
    source = load_text(rows(tmp_path / "a.jsonl", {"messages": talk}, {"messages": TALK}))
    sample = sample_windows(source, tokenizer, 16, None)
    assert sample.scored is not None and bool(sample.scored[:, 1:].any(1).all())
    assert len(sample.tokens) < 200 / 16 and sample.tokens.shape == sample.scored.shape
    assert len(set(sample.window_ids.tolist())) == len(sample.tokens)


def test_unusable_rows_are_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    silent = load_text(rows(tmp_path / "a.jsonl", {"messages": TALK[:1]}, {"messages": TALK[1:2]}))
    with pytest.raises(UserError, match="has no usable row: none of its 2 conversations"):
        sample_windows(silent, tokenizer, 16, None)
    mixed = load_text(rows(tmp_path / "b.jsonl", {"messages": TALK}, {"text": "plain"}))
    with pytest.raises(UserError, match="mixes rows of text with rows of messages"):
        sample_windows(mixed, tokenizer, 16, None)
    with pytest.raises(UserError, match="--seqlen 16: this model takes 1 to 8"):
        sample_windows(load_text(rows(tmp_path / "c.jsonl", {"messages": TALK})), tokenizer, 16, 8)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        sample_windows(silent, tokenizer, 16, None)


def test_calls_of_tools_are_answers_and_everything_is_rendered_as_the_template_does() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<s>{{ m.role }}: "
        "{% if m.content is string %}{{ m.content }}{% elif m.content %}{{ m.content[0].text }}{% endif %}"
        "{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )
    talk = (
        {"role": "user", "content": [{"type": "text", "text": "one"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]},
        {"role": "tool", "content": "three"},
        {"role": "assistant", "content": "four"},
        {"role": "assistant", "content": None},
    )
    tools = ({"name": "f", "description": "five"},)
    ids, scored = answer_tokens(Conversation(talk, tools), tokenizer, "here")
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(list(talk), tools=list(tools), tokenize=False)
    assert tokenizer.decode(ids[scored]) == '{"name": "f"}</s>four</s>'


def test_a_refused_conversation_names_its_line(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    silent = [{"role": "system", "content": "x"}, *TALK]
    text = load_text(rows(tmp_path / "a.jsonl", {"messages": TALK}, {"messages": silent}))
    with pytest.raises(UserError, match=r"a.jsonl line 2: the chat template fails .*no system role"):
        sample_windows(text, tokenizer, 16, None)


def test_tokens_that_the_model_does_not_have_are_refused_and_never_pad(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    talk = load_text(rows(tmp_path / "a.jsonl", {"messages": TALK}))
    with pytest.raises(UserError, match=r"the token id \d+ .*the model has only 80 tokens"):
        sample_windows(talk, tokenizer, 16, None, vocabulary=80)
    tokenizer.add_special_tokens({"pad_token": "<added>"})
    sample = sample_windows(talk, tokenizer, 64, None, vocabulary=VOCAB)
    assert int(sample.tokens.max()) < VOCAB
    assert int(sample_windows(talk, tokenizer, 64, None).tokens.max()) == VOCAB
