"""Text written by a model: exact samples of its own distribution, the same for one seed, whatever the batch."""

from __future__ import annotations

import pytest
import torch
from tiny import VOCAB, tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from reallm.errors import UserError
from reallm.text.model_written import Start, media_tokens, text_start, write_windows

BOS = Start((0,), frozenset(), "a test")
pytestmark = pytest.mark.usefixtures("one_thread")


def log_probabilities(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Log-probabilities of all tokens after each position of `ids` [n, seqlen]: float64 [n, seqlen, vocabulary]."""
    with torch.no_grad():
        return model(input_ids=ids).logits.double().log_softmax(-1)


def chi_square(ids: Tensor, probabilities: Tensor) -> float:
    """Pearson's statistic of the sampled `ids` [n], less its mean, in standard deviations.

    With k bins it has mean k - 1 and variance 2 (k - 1) if the ids are samples of `probabilities` [vocabulary].
    """
    expected = probabilities * len(ids)
    counts = torch.bincount(ids, minlength=len(expected)).double()
    common = expected >= 5  # rare tokens are counted together
    seen, wanted = (torch.cat([values[common], values[~common].sum()[None]]) for values in (counts, expected))
    freedom = len(seen) - 1
    return float(((seen - wanted) ** 2 / wanted).sum() - freedom) / (2 * freedom) ** 0.5


def test_first_tokens_have_the_frequencies_of_the_softmax() -> None:
    model = tiny_model("llama", settings={"vocab_size": 40, "initializer_range": 0.5})
    first = write_windows(model, BOS, range(4000), 2)[:, 1]
    expected = log_probabilities(model, torch.tensor([[0]]))[0, 0]
    assert chi_square(first, expected.exp()) < 4
    assert chi_square(first, (1.2 * expected).softmax(0)) > 10  # the test tells a temperature of 1 from 0.83


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "mixtral"])
def test_every_token_is_a_sample_given_those_before(architecture: str) -> None:
    model = tiny_model(architecture)
    windows = write_windows(model, BOS, range(24), 80)  # longer than gemma2's attention window of 32
    known = log_probabilities(model, windows)[:, :-1]
    entropy = -(known.exp() * known).sum(-1)
    variance = (known.exp() * known**2).sum(-1) - entropy**2
    surprise = -known.gather(2, windows[:, 1:, None])[..., 0]
    assert abs(float((surprise - entropy).sum() / variance.sum().sqrt())) < 4  # a martingale: a standard normal


def test_one_seed_gives_one_text_in_any_batch() -> None:
    model = tiny_model("llama")
    together = write_windows(model, BOS, range(6), 30, seed=3)
    assert torch.equal(together, write_windows(model, BOS, range(6), 30, seed=3))
    assert not torch.equal(together, write_windows(model, BOS, range(6), 30, seed=4))
    assert len(together.unique(dim=0)) == 6
    alone = torch.cat([write_windows(model, BOS, [index], 30, seed=3) for index in range(6)])
    assert torch.equal(alone, together)
    assert (together.shape, together.dtype, together[:, 0].tolist()) == ((6, 30), torch.int64, [0] * 6)


def test_the_generation_settings_of_the_model_have_no_effect() -> None:
    model = tiny_model("llama")
    plain = write_windows(model, BOS, range(3), 20)
    settings = GenerationConfig(repetition_penalty=9.0, top_k=1, do_sample=True, eos_token_id=list(range(100)))
    model.generation_config = settings
    assert torch.equal(write_windows(model, BOS, range(3), 20), plain)
    assert model.generation_config is settings


def test_another_text_begins_where_one_ends() -> None:
    model, ends = tiny_model("llama"), frozenset(range(50, 150))
    windows = write_windows(model, Start((3, 0, 7), ends, "a test"), range(4), 60)
    assert windows.shape == (4, 60)
    ended = 0
    for window in windows.tolist():
        assert window[:3] == [3, 0, 7]
        for position in range(3, 57):
            if window[position] in ends:
                assert window[position + 1 : position + 4] == [3, 0, 7]
                ended += 1
    assert ended > 20


def test_a_window_shorter_than_the_start_is_cut() -> None:
    start = Start((3, 0, 7), frozenset(), "a test")
    assert write_windows(tiny_model("llama"), start, range(2), 2).tolist() == [[3, 0], [3, 0]]


def test_tokens_of_images_are_never_written() -> None:
    model = tiny_model("llama", settings={"vocab_size": 12})
    assert 5 in write_windows(model, BOS, range(20), 20)
    model.config.image_token_id = 5
    model.config.video_token_index = None
    assert media_tokens(model) == [5]
    assert 5 not in write_windows(model, BOS, range(20), 20)


def test_texts_begin_as_the_tokenizer_begins_them() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    assert text_start(model, tokenizer) == Start((0,), frozenset({2}), "its BOS token")
    special = [("<unk>", 3), ("<s>", 0)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<unk> <s> $A", special_tokens=special)
    assert text_start(model, tokenizer) == Start((3, 0), frozenset({2}), "as its tokenizer begins a text")


def test_the_start_without_a_bos_token() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    tokenizer.bos_token = None
    model.generation_config.bos_token_id = 9
    assert text_start(model, tokenizer) == Start((9,), frozenset({2}), "the BOS token of its generation settings")
    model.generation_config.bos_token_id = VOCAB  # a token that the model does not have
    model.config.bos_token_id = None
    eos = text_start(model, tokenizer)
    assert eos == Start((2,), frozenset(), "its EOS token, as it has no BOS token")
    tokenizer.eos_token = model.generation_config.eos_token_id = None
    assert text_start(model, tokenizer) is None


def test_weights_that_are_not_finite_are_one_line() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    with pytest.raises(UserError, match="logits of token 2 are not finite") as caught:
        write_windows(model, BOS, range(2), 5)
    assert "\n" not in str(caught.value) and "--text" in str(caught.value)


def test_a_model_that_cannot_generate_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")

    def fail(**_: object) -> None:
        raise IndexError("out of range\nin a cache")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(UserError, match=r"cannot write its calibration text \(out of range\); give a text file"):
        write_windows(model, BOS, range(2), 5)
