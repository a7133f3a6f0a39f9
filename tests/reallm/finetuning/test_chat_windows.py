"""In a conversation the tokens of the answers are scored, including their end marks, and no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_tokenizer

from reallm.errors import UserError
from reallm.finetuning.chat_windows import answer_tokens, sample_windows
from reallm.text.corpus import load_text

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
    ids, scored = answer_tokens(tuple(TALK), tokenizer, "here")
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
