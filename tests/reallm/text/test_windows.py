"""Windows cut from a text: their number, order and length, and chat templates."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import POSITIONS, VOCAB, tiny_tokenizer

from reallm.errors import UserError
from reallm.text.corpus import Text
from reallm.text.windows import cut_windows, shortage, tokenize

TOKENIZER = tiny_tokenizer()  # one token per byte, so that lengths can be counted


def text_of(*documents) -> Text:
    return Text(documents, "a test", "0")


def error_message(call, *arguments, **options) -> str:
    """The message of the UserError that `call` raises, which must be one line."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_evaluation_windows_are_consecutive_and_drop_the_partial_one():
    text = text_of("abcdefgh", "ijklmnop", "q")
    cut = cut_windows(text, TOKENIZER, None, 5)
    assert cut.dtype == torch.int64
    assert TOKENIZER.decode(cut.flatten()) == "abcdefgh\n\nijklmnop\n\n"  # 21 tokens, the q dropped
    assert cut.shape == (4, 5)


@given(size=st.integers(1, 400), seqlen=st.integers(1, 60), nsamples=st.integers(1, 30), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_drawn_windows_do_not_overlap(size, seqlen, nsamples, seed):
    # each pair of tokens spells its own index, so that a window can be found again in the text
    content = "".join(chr(33 + i // 60) + chr(33 + i % 60) for i in range(size))
    if 2 * size < seqlen:
        assert "needed for one window" in error_message(
            cut_windows, text_of(content), TOKENIZER, nsamples, seqlen, seed
        )
        return
    drawn = cut_windows(text_of(content), TOKENIZER, nsamples, seqlen, seed)
    assert drawn.shape == (min(nsamples, 2 * size // seqlen), seqlen)
    assert (shortage(drawn, nsamples) is None) == (len(drawn) == nsamples)
    tokens, position = tokenize(text_of(content), TOKENIZER), 0
    for window in drawn:  # each lies after the end of the one before
        starts = (s for s in range(position, len(tokens) - seqlen + 1) if torch.equal(tokens[s : s + seqlen], window))
        position = next(starts) + seqlen


def test_one_seed_gives_one_choice_of_windows():
    text = text_of("".join(chr(33 + i % 90) for i in range(9000)))
    first, again, other = (cut_windows(text, TOKENIZER, 8, 64, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_ten_words_are_too_few():
    message = error_message(
        cut_windows, text_of("one two three four five six seven eight nine ten"), TOKENIZER, 16, 128
    )
    assert "48 tokens found, 128 needed" in message
    assert "--seqlen" in message


def test_too_few_windows_give_a_note():
    drawn = cut_windows(text_of("x" * 300), TOKENIZER, 16, 100)
    assert drawn.shape == (3, 100)
    assert shortage(drawn, 16) == "the text has only 3 windows of 100 tokens, not 16: all are used"


def test_a_window_length_that_the_model_cannot_take():
    assert f"takes 1 to {POSITIONS}" in error_message(cut_windows, text_of("x" * 999), TOKENIZER, 1, POSITIONS + 1)
    assert "takes 1 to 64" in error_message(cut_windows, text_of("x" * 999), TOKENIZER, 1, 65, max_positions=64)
    assert cut_windows(text_of("x" * 999), TOKENIZER, 1, 300, max_positions=512).shape == (1, 300)
    for seqlen in (0, -1):
        error_message(cut_windows, text_of("x" * 999), TOKENIZER, 1, seqlen)
    assert "--nsamples 0" in error_message(cut_windows, text_of("x" * 999), TOKENIZER, 0, 8)


def test_chat_template_wraps_plain_documents():
    tokens = tokenize(text_of("hi", "ho"), TOKENIZER, chat_template=True)
    assert TOKENIZER.decode(tokens) == "<s>user: hi</s><s>user: ho</s>"
    assert tokens[0] == TOKENIZER.bos_token_id
    assert int(tokens.max()) < VOCAB


def test_a_tokenizer_without_chat_template():
    plain = tiny_tokenizer()
    plain.chat_template = None
    assert "no chat template" in error_message(tokenize, text_of("hi"), plain, chat_template=True)
    assert tokenize(text_of("hi"), plain).shape == (2,)
