"""The inputs of calibration: what cannot be masked is refused before the model runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import VOCAB, save_tiny, tiny_tokenizer

from reallm.calibration.objective import Objective
from reallm.errors import UserError
from reallm.models.loaded import load_model


def test_a_mask_token_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    folder = save_tiny("roberta", tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<added>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=f"the mask token: .* token id {VOCAB} .*the model has only {VOCAB} tokens"):
        Objective(load_model(folder), torch.full((2, 8), 9), seed=0)
