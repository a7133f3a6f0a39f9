"""Which tokens of a window are scored, and what the model sees there."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from reallm.errors import UserError
from reallm.text.masking import MASK_SHARE, causal_window, mask_token_of, mask_window, mask_windows

MASK = 4


def test_causal_window_predicts_each_token_from_those_before() -> None:
    scored = causal_window(torch.tensor([7, 8, 9]))
    assert scored.inputs.tolist() == [[7, 8, 9]]
    assert scored.positions.tolist() == [0, 1]
    assert scored.targets.tolist() == [8, 9]


def test_masked_window_hides_what_is_to_be_predicted() -> None:
    window = torch.arange(10, 110)
    scored = mask_window(window, MASK, seed=3)
    assert scored.positions.numel() == round(MASK_SHARE * 100)
    assert (scored.inputs[0, scored.positions] == MASK).all()
    assert torch.equal(scored.targets, window[scored.positions])
    assert int((scored.inputs[0] != window).sum()) == scored.positions.numel()
    assert torch.equal(mask_window(window, MASK, seed=3).positions, scored.positions)
    assert not torch.equal(mask_window(window, MASK, seed=4).positions, scored.positions)


def test_masked_windows_hide_the_first_token_and_a_share_of_the_others() -> None:
    windows = torch.arange(10, 4010).view(4, 1000)
    inputs, masked = mask_windows(windows, MASK, seed=3)
    assert masked[:, 0].all()
    assert torch.equal(inputs, torch.where(masked, MASK, windows))
    # 3996 draws of probability 0.15 have a standard deviation of 23: five of them on either side
    assert abs(int(masked.sum()) - 4 - MASK_SHARE * 3996) < 115
    assert torch.equal(mask_windows(windows, MASK, seed=3)[1], masked)
    assert not torch.equal(mask_windows(windows, MASK, seed=4)[1], masked)


def test_only_an_encoder_needs_a_mask_token() -> None:
    tokenizer = tiny_tokenizer()
    assert mask_token_of(tiny_model("llama"), tokenizer, "it") is None
    assert mask_token_of(tiny_model("roberta"), tokenizer, "it") == MASK
    tokenizer.mask_token = None
    with pytest.raises(UserError, match="it neither generates nor has a mask token"):
        mask_token_of(tiny_model("roberta"), tokenizer, "it")


def test_a_mask_token_that_the_model_does_not_have_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<added>"})
    with pytest.raises(UserError, match="it: the mask token has the id 261, but the model has only 261 tokens"):
        mask_token_of(tiny_model("roberta"), tokenizer, "it")
