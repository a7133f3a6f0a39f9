"""Evaluation of one loaded model against another: the figures against independent formulas, and the errors."""

from __future__ import annotations

import math
from dataclasses import astuple

import pytest
import torch
from tiny import tiny_model
from torch.nn import functional
from transformers import LlamaForCausalLM

from reallm.errors import UserError
from reallm.evaluation.compare import compare_models
from reallm.text.masking import MASK_SHARE

VOCAB, MASK = 261, 4


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(5, VOCAB, (3, 40), generator=torch.Generator().manual_seed(1))


def test_a_model_against_itself_has_no_divergence(windows: torch.Tensor) -> None:
    model = tiny_model("llama")
    result = compare_models(model, model, windows, progress=False)
    assert result.divergence is not None
    assert astuple(result.divergence) == (0.0,) * 7 + (1.0,)
    assert result.perplexity == result.base_perplexity
    assert (result.windows, result.seqlen, result.tokens) == (3, 40, 3 * 39)


def test_figures_equal_their_definitions_in_float64(windows: torch.Tensor) -> None:
    base, model = tiny_model("llama", seed=0), tiny_model("llama", seed=1)
    result = compare_models(base, model, windows, progress=False)
    with torch.inference_mode():
        log_p, log_q = (m(windows).logits[:, :-1].double().log_softmax(-1) for m in (base, model))
    kl = functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).flatten()
    # A float32 log_softmax of V = 261 logits below 10 in magnitude errs by about 10 eps = 1e-6 per entry; p sums
    # to one, so the KL of a token has a few times that.
    near = 1e-5
    assert result.divergence is not None
    assert result.divergence.mean == pytest.approx(float(kl.mean()), abs=near)
    assert result.divergence.median == pytest.approx(float(kl.quantile(0.5)), abs=near)
    assert result.divergence.p99 == pytest.approx(float(kl.quantile(0.99)), abs=near)
    assert result.divergence.max == pytest.approx(float(kl.max()), abs=near)
    assert result.divergence.same_top1 == float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean())
    loss = functional.nll_loss(log_q.flatten(0, 1), windows[:, 1:].flatten())
    assert math.log(result.perplexity) == pytest.approx(float(loss), abs=near)


def test_percentiles_are_ordered_and_the_direction_matters(windows: torch.Tensor) -> None:
    one, two = tiny_model("llama", seed=0), tiny_model("llama", seed=1)
    forward = compare_models(one, two, windows, progress=False).divergence
    backward = compare_models(two, one, windows, progress=False).divergence
    assert forward is not None
    assert backward is not None
    tail = [forward.median, forward.p90, forward.p95, forward.p99, forward.p999, forward.max]
    assert tail == sorted(tail)
    assert forward.mean != backward.mean
    assert forward.same_top1 == backward.same_top1


def test_long_windows_are_scored_like_short_ones_row_by_row() -> None:
    """200 positions are more than the rows processed at once; none may be lost or repeated."""
    window = torch.randint(5, VOCAB, (1, 201), generator=torch.Generator().manual_seed(2))
    model = tiny_model("llama")
    with torch.inference_mode():
        loss = model(window, labels=window).loss
    result = compare_models(None, model, window, progress=False)
    assert result.tokens == 200
    assert math.log(result.perplexity) == pytest.approx(float(loss), abs=1e-5)  # float32 sums, as above
    assert result.divergence is None
    assert result.base_perplexity is None


def test_encoder_is_scored_on_masked_tokens_only(windows: torch.Tensor) -> None:
    base, model = tiny_model("roberta", seed=0), tiny_model("roberta", seed=1)
    result = compare_models(base, model, windows, mask_token=MASK, progress=False)
    assert result.tokens == 3 * round(MASK_SHARE * 40)
    assert result.divergence is not None
    assert result.divergence.mean > 0
    assert result == compare_models(base, model, windows, mask_token=MASK, progress=False)


def test_logits_that_are_not_finite_are_an_error(windows: torch.Tensor) -> None:
    base, model = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        next(model.parameters())[int(windows[1, 3]), 0] = math.nan
    with pytest.raises(UserError, match=r"^window \d of the evaluated model: the logits hold NaN"):
        compare_models(base, model, windows, progress=False)


def test_models_of_different_vocabularies_are_refused(windows: torch.Tensor) -> None:
    model = tiny_model("llama")
    assert isinstance(model, LlamaForCausalLM)
    model.resize_token_embeddings(VOCAB + 3)
    with pytest.raises(UserError, match=r"the base has a vocabulary of 261, the model 264"):
        compare_models(tiny_model("llama"), model, windows, progress=False)
