"""Texts from every kind of source, windows cut from them, and one clear line for each bad one."""

import json
import os
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import POSITIONS, VOCAB, tiny_tokenizer

from reallm.errors import UserError
from reallm.text.corpus import Text, load_text, shortage, tokenize, windows
from reallm.text.offline import prose

TOKENIZER = tiny_tokenizer()  # one token a byte, so that lengths can be counted


def text_of(*documents) -> Text:
    return Text(documents, "a test", "0")


def complaint(call, *arguments, **options) -> str:
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


def test_digest_follows_the_text_and_not_the_place(tmp_path):
    for name, content in (("a.txt", "same"), ("b.txt", "same"), ("c.txt", "other")):
        (tmp_path / name).write_text(content)
    first, second, third = (load_text(tmp_path / f"{name}.txt").sha256 for name in "abc")
    assert first == second != third
    assert len(first) == 64


def test_jsonl_takes_texts_and_conversations(tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "plain", "id": 1}, {"messages": turns})
    text = load_text(path)
    assert text.documents == ("plain", tuple(turns))
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
    assert "no data set" in complaint(load_text, f"{tmp_path}:validation")
    assert "NAME:CONFIG:SPLIT" in complaint(load_text, f"{tmp_path}:a:b:c")


def test_a_large_data_set_is_cut_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("reallm.text.readers.MAX_DATASET_CHARACTERS", 25)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["ten chars."] * 9}), tmp_path / "train.parquet")
    text = load_text(str(tmp_path))
    assert len(text.documents) == 3
    assert "its first 3 rows" in text.description


def test_missing_file_is_told_without_asking_the_network(tmp_path):
    for name in (tmp_path / "no.txt", "no.jsonl", "no.parquet", "./no", "~/no", tmp_path / "no", "a/b/c"):
        assert "does not exist" in complaint(load_text, name)


def test_unknown_kind_empty_file_and_wrong_encoding(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    assert ".txt, .jsonl, .parquet" in complaint(load_text, tmp_path / "a.pdf")
    (tmp_path / "a.txt").write_text(" \n")
    assert "holds no text" in complaint(load_text, tmp_path / "a.txt")
    (tmp_path / "a.jsonl").write_text("")
    assert "holds no text" in complaint(load_text, tmp_path / "a.jsonl")
    (tmp_path / "a.txt").write_bytes("naïve".encode("latin-1"))
    assert "is not UTF-8 (byte 2)" in complaint(load_text, tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("{", "is not JSON"),
        ("3", "holds int"),
        ("{}", "holds nothing"),
        ('{"txt": "x"}', "holds txt"),
        ('{"text": 5}', "holds text"),
        ('{"messages": []}', "holds messages"),
        ('{"messages": [{"role": "user"}]}', "holds messages"),
    ],
)
def test_a_bad_line_of_jsonl_is_named(tmp_path, line, found):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    message = complaint(load_text, path)
    assert f"{path} line 3" in message
    assert found in message


def test_parquet_without_the_column_or_damaged(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "body": ["x"]}), path)
    assert "has the columns id, body; expected one called text" in complaint(load_text, path)
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), path)
    assert "holds no strings" in complaint(load_text, path)
    path.write_bytes(path.read_bytes()[:-20])
    assert "cannot be read as parquet" in complaint(load_text, path)


@pytest.fixture(scope="module")
def offline():
    return {split: load_text(None, split) for split in ("train", "test")}


def test_the_offline_default_is_large_and_says_what_it_is(offline):
    for split, text in offline.items():
        assert text.is_fallback
        assert "offline default" in text.description
        assert split in text.description
    # the figures of Python 3.11 are 690 and 240 kB; other releases carry more or a little less
    assert sum(map(len, offline["train"].documents)) > 500_000
    assert sum(map(len, offline["test"].documents)) > 100_000


def test_the_parts_of_the_offline_default_share_no_paragraph(offline):
    train, test = ({p for d in offline[split].documents for p in d.split("\n\n")} for split in ("train", "test"))
    assert not train & test
    assert offline["train"].sha256 != offline["test"].sha256


def test_the_offline_default_is_the_same_in_every_process(offline):
    program = "from reallm.text.offline import offline_documents as d; print(ascii(d('train')[0]))"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    shown = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == ascii(offline["train"].documents)


def test_the_offline_default_is_prose(offline):
    joined = " ".join(offline["train"].documents)
    assert ">>>" not in joined
    assert "``" not in joined
    assert "====" not in joined


def test_prose_keeps_paragraphs_and_drops_code_and_markup():
    prose_part = "The :func:`len` of a *list* is the\nnumber of ``items`` that it holds."
    raw = f"Title\n*****\n\n{prose_part}\n\n>>> len([1])\n1\n\nx = {{1: 2}}"
    assert list(prose(raw)) == ["The len of a list is the number of items that it holds."]


def test_evaluation_windows_are_consecutive_and_drop_the_partial_one():
    text = text_of("abcdefgh", "ijklmnop", "q")
    cut = windows(text, TOKENIZER, None, 5)
    assert cut.dtype == torch.int64
    assert TOKENIZER.decode(cut.flatten()) == "abcdefgh\n\nijklmnop\n\n"  # 21 tokens, the q dropped
    assert cut.shape == (4, 5)


@given(size=st.integers(1, 400), seqlen=st.integers(1, 60), nsamples=st.integers(1, 30), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_drawn_windows_do_not_overlap(size, seqlen, nsamples, seed):
    # two tokens spell the index of their pair, so that a window can be found again in the text
    content = "".join(chr(33 + i // 60) + chr(33 + i % 60) for i in range(size))
    if 2 * size < seqlen:
        assert "needed for one window" in complaint(windows, text_of(content), TOKENIZER, nsamples, seqlen, seed)
        return
    drawn = windows(text_of(content), TOKENIZER, nsamples, seqlen, seed)
    assert drawn.shape == (min(nsamples, 2 * size // seqlen), seqlen)
    assert (shortage(drawn, nsamples) is None) == (len(drawn) == nsamples)
    whole, position = tokenize(text_of(content), TOKENIZER), 0
    for window in drawn:  # each is found after the end of the one before
        starts = (s for s in range(position, len(whole) - seqlen + 1) if torch.equal(whole[s : s + seqlen], window))
        position = next(starts) + seqlen


def test_windows_follow_the_seed_and_spread_over_the_text():
    text = text_of("".join(chr(33 + i % 90) for i in range(9000)))
    first, again, other = (windows(text, TOKENIZER, 8, 64, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_ten_words_are_too_few():
    message = complaint(windows, text_of("one two three four five six seven eight nine ten"), TOKENIZER, 16, 128)
    assert "48 tokens found, 128 needed" in message
    assert "--seqlen" in message


def test_fewer_windows_than_asked_for_are_said():
    drawn = windows(text_of("x" * 300), TOKENIZER, 16, 100)
    assert drawn.shape == (3, 100)
    assert shortage(drawn, 16) == "the text has only 3 windows of 100 tokens, not 16: all are used"


def test_a_length_the_model_cannot_take():
    assert f"takes 1 to {POSITIONS}" in complaint(windows, text_of("x" * 999), TOKENIZER, 1, POSITIONS + 1)
    assert "takes 1 to 64" in complaint(windows, text_of("x" * 999), TOKENIZER, 1, 65, max_positions=64)
    assert windows(text_of("x" * 999), TOKENIZER, 1, 300, max_positions=512).shape == (1, 300)
    for seqlen in (0, -1):
        complaint(windows, text_of("x" * 999), TOKENIZER, 1, seqlen)
    assert "--nsamples 0" in complaint(windows, text_of("x" * 999), TOKENIZER, 0, 8)


def test_chat_template_wraps_plain_documents():
    tokens = tokenize(text_of("hi", "ho"), TOKENIZER, chat_template=True)
    assert TOKENIZER.decode(tokens) == "<s>user: hi</s><s>user: ho</s>"
    assert tokens[0] == TOKENIZER.bos_token_id
    assert int(tokens.max()) < VOCAB


def test_a_tokenizer_without_chat_template():
    plain = tiny_tokenizer()
    plain.chat_template = None
    assert "no chat template" in complaint(tokenize, text_of("hi"), plain, chat_template=True)
    assert tokenize(text_of("hi"), plain).shape == (2,)
