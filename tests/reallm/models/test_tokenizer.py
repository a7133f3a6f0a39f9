"""Loading tokenizers: damaged and incomplete ones are one line, whatever class transformers raises."""

import json

import pytest
from tiny import save_tiny

from reallm.errors import UserError
from reallm.models.source import locate
from reallm.models.tokenizer import load_tokenizer


@pytest.fixture
def folder(tmp_path):
    return save_tiny("llama", tmp_path)


def message(folder) -> str:
    with pytest.raises(UserError) as caught:
        load_tokenizer(locate(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_without_tokenizer_files(folder):
    for path in folder.glob("*token*"):
        path.unlink()
    assert load_tokenizer(locate(folder)) is None


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "GPT2Tokenizer", "BertTokenizer", "T5Tokenizer"])
def test_a_tokenizer_without_its_vocabulary_is_not_taken_for_an_empty_one(folder, kind):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    assert "its vocabulary is empty" in message(folder)


def test_a_vocabulary_without_its_merges(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}))
    assert "the tokenizer of" in message(folder)
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    tokenizer = load_tokenizer(locate(folder))
    assert tokenizer is not None
    assert tokenizer("ab")["input_ids"] == [2]


@pytest.mark.parametrize("text", ["", "[]", "{", "7"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_files(folder, name, text):
    (folder / name).write_text(text)
    assert str(folder) in message(folder)


def test_a_crash_inside_the_tokenizers_library(folder):
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}))
    assert "precompiled_charsmap" in message(folder)
