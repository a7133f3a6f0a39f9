"""The offline default text: large, reproducible prose with disjoint splits."""

import os
import subprocess
import sys

import pytest

from reallm.text.corpus import load_text
from reallm.text.offline import prose


@pytest.fixture(scope="module")
def offline():
    return {split: load_text(None, split) for split in ("train", "test")}


def test_the_text_has_a_name(offline):
    for split, text in offline.items():
        assert load_text("python", split) == text


def test_the_offline_default_is_large_and_described_as_such(offline):
    for split, text in offline.items():
        assert text.is_fallback
        assert "offline default" in text.description
        assert split in text.description
    # Python 3.11 has 690 and 240 kB; other releases have more or slightly less
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
