"""Texts from every kind of source, and a one-line error for each bad source."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from tiny import tiny_tokenizer

from reallm.errors import UserError
from reallm.text.corpus import load_text
from reallm.text.documents import Conversation
from reallm.text.windows import tokenize

TOKENIZER = tiny_tokenizer()  # one token per byte, so that lengths can be counted


def error_message(call, *arguments, **options) -> str:
    """The message of the UserError that `call` raises, which must be one line."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write_jsonl(path, *rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_a_txt_file_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\ufeffFirst.\n\nSecond, ünïcode.\n", encoding="utf-8")
    text = load_text(str(path))
    assert text.documents == ("First.\n\nSecond, ünïcode.\n",)
    assert (text.description, text.is_fallback) == (str(path), False)


def test_digest_depends_on_the_text_and_not_on_the_path(tmp_path):
    for name, content in (("a.txt", "same"), ("b.txt", "same"), ("c.txt", "other")):
        (tmp_path / name).write_text(content)
    first, second, third = (load_text(tmp_path / f"{name}.txt").sha256 for name in "abc")
    assert first == second != third
    assert len(first) == 64


def test_jsonl_holds_texts_and_conversations(tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "plain", "id": 1}, {"messages": turns})
    text = load_text(path)
    assert text.documents == ("plain", Conversation(tuple(turns)))
    assert TOKENIZER.decode(tokenize(text, TOKENIZER)) == "plain<s>user: hi</s><s>assistant: hello</s>"


def test_parquet_reads_its_text_column(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": ["one", None, "three"]}), path)
    assert load_text(path).documents == ("one", "", "three")


def test_a_data_set_by_name_configuration_and_split(tmp_path):
    for split, value in (("train", "to learn"), ("test", "to judge")):
        pyarrow.parquet.write_table(pyarrow.table({"text": [value] * 2}), tmp_path / f"{split}.parquet")
    assert load_text(str(tmp_path)).documents == ("to learn",) * 2
    assert load_text(str(tmp_path), split="test").documents == ("to judge",) * 2
    named = load_text(f"{tmp_path}:test")
    assert named.documents == ("to judge",) * 2
    assert "split test" in named.description
    assert load_text(f"{tmp_path}:default:train").documents == ("to learn",) * 2
    assert "no data set" in error_message(load_text, f"{tmp_path}:validation")
    assert "NAME:CONFIG:SPLIT" in error_message(load_text, f"{tmp_path}:a:b:c")


def test_a_large_data_set_is_cut_and_its_description_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("reallm.text.readers.MAX_DATASET_CHARACTERS", 25)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["ten chars."] * 9}), tmp_path / "train.parquet")
    text = load_text(str(tmp_path))
    assert len(text.documents) == 3
    assert "its first 3 rows" in text.description


def test_a_missing_file_is_reported_without_asking_the_network(tmp_path):
    for name in (tmp_path / "no.txt", "no.jsonl", "no.parquet", "./no", "~/no", tmp_path / "no", "a/b/c"):
        assert "does not exist" in error_message(load_text, name)


def test_unknown_kind_empty_file_and_wrong_encoding(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    assert ".txt, .jsonl, .parquet" in error_message(load_text, tmp_path / "a.pdf")
    (tmp_path / "a.txt").write_text(" \n")
    assert "holds no text" in error_message(load_text, tmp_path / "a.txt")
    (tmp_path / "a.jsonl").write_text("")
    assert "holds no text" in error_message(load_text, tmp_path / "a.jsonl")
    (tmp_path / "a.txt").write_bytes("naïve".encode("latin-1"))
    assert "is not UTF-8 (byte 2)" in error_message(load_text, tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("{", "is not JSON"),
        ("3", "holds int"),
        ("{}", "holds nothing"),
        ('{"txt": "x"}', "holds txt (str)"),
        ('{"text": 5}', "holds text (int)"),
        ('{"messages": []}', "holds messages"),
        ('{"messages": [{"role": "user"}]}', "message 1 has no content"),
        ('{"messages": [{"role": "user", "content": "a"}, 3]}', "message 2 is int"),
        ('{"messages": [{"content": "a"}]}', "message 1 has no role"),
        ('{"messages": [{"role": 3, "content": "a"}]}', "message 1 has no role"),
        ('{"messages": [{"role": "user", "content": 3.5}]}', "content of type float"),
        ('{"messages": [{"role": "user", "content": [{"text": "a"}]}]}', "a part without a type"),
        ('{"messages": [{"role": "user", "content": [7]}]}', "a part without a type"),
        ('{"messages": "a"}', "holds messages"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": "f"}', "tools is a string that is not JSON"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": "3"}', "tools is not a list"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": [3]}', "tools is not a list"),
        ("[" * 100_000, "is not JSON"),
        ("1" * 10_000, "is not JSON"),
    ],
)
def test_a_bad_line_of_jsonl_is_named(tmp_path, line, found):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    message = error_message(load_text, path)
    assert f"{path} line 3" in message
    assert found in message


def test_images_that_are_not_read_are_reported(tmp_path, caplog):
    parts = [{"type": "text", "text": "hi"}]
    load_text(write_jsonl(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": parts}]}, {"text": "x"}))
    assert not caplog.records
    parts.append({"type": "image", "url": "a.png"})
    load_text(write_jsonl(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": parts}]}, {"text": "x"}))
    assert "a.jsonl: 1 conversations have images" in caplog.text


def test_conversations_keep_calls_of_tools_parts_and_null_content(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    parts = {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "image"}]}
    tools = [{"type": "function", "function": {"name": "f"}}]
    text = load_text(write_jsonl(tmp_path / "a.jsonl", {"messages": [parts, call], "tools": tools}))
    assert text.documents == (Conversation((parts, call), tuple(tools)),)
    plain = load_text(write_jsonl(tmp_path / "b.jsonl", {"messages": [parts, call]}))
    assert plain.documents == (Conversation((parts, call)),)
    assert plain.sha256 != text.sha256
    stored = load_text(write_jsonl(tmp_path / "c.jsonl", {"messages": [parts, call], "tools": json.dumps(tools)}))
    assert stored.documents == text.documents and stored.sha256 == text.sha256


def test_parquet_reads_conversations_without_the_nulls_that_a_table_adds(tmp_path):
    call = {"role": "assistant", "content": None, "name": "f"}
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"messages": [[{"role": "user", "content": "hi"}, call]]}), path)
    assert load_text(path).documents == (Conversation(({"role": "user", "content": "hi"}, call)),)
    pyarrow.parquet.write_table(pyarrow.table({"messages": [[{"role": "user", "content": "hi"}], []]}), path)
    assert f"{path} row 2 holds messages" in error_message(load_text, path)


def test_each_document_has_a_place(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    text = load_text(path)
    assert [text.place(0), text.place(1)] == [f"{path} line 1", f"{path} line 3"]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"]}), tmp_path / "train.parquet")
    assert load_text(tmp_path / "train.parquet").place(1) == f"{tmp_path / 'train.parquet'} row 2"
    assert load_text(str(tmp_path)).place(1) == f"--text {tmp_path} row 2"


def test_a_text_given_in_place_of_a_path_is_refused():
    assert "expected the path of a file" in error_message(load_text, "a word " * 100 + ".txt")


def test_parquet_without_the_column_or_damaged(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "body": ["x"]}), path)
    assert "has the columns id, body; expected one called text or messages" in error_message(load_text, path)
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), path)
    assert "holds no strings" in error_message(load_text, path)
    path.write_bytes(path.read_bytes()[:-20])
    assert "cannot be read as parquet" in error_message(load_text, path)
