"""The cosine between the embeddings of two encoders, against its definition, and the errors."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import VOCAB, tiny_model
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedModel

from reallm.errors import UserError
from reallm.evaluation.embeddings import mean_cosine
from reallm.models.sentence_encoder import SentenceEncoder


@pytest.fixture
def texts() -> Tensor:
    return torch.randint(5, VOCAB, (3, 20), generator=torch.Generator().manual_seed(1))


def bert(seed: int, hidden: int = 48) -> PreTrainedModel:
    """A BERT without an output layer for tokens."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=80, num_hidden_layers=2, num_attention_heads=3
    )
    return BertModel(config).eval()


def test_a_model_and_itself_have_the_cosine_one(texts: Tensor) -> None:
    # float32 unit vectors of 48 values: each product errs by about 1e-7
    for model in (tiny_model("roberta"), bert(0)):
        assert mean_cosine(model, model, texts, SentenceEncoder(), progress=False) == pytest.approx(1, abs=1e-6)


def test_the_cosine_is_that_of_the_mean_of_the_last_hidden_states(texts: Tensor) -> None:
    for base, model in ((tiny_model("roberta"), tiny_model("roberta", seed=1)), (bert(0), bert(1))):
        with torch.no_grad():
            means = [
                each(texts, output_hidden_states=True).hidden_states[-1].double().mean(1) for each in (base, model)
            ]
        expected = float(torch.cosine_similarity(*means).mean())
        assert expected < 0.999
        assert mean_cosine(base, model, texts, SentenceEncoder(), progress=False) == pytest.approx(expected, abs=1e-6)
        first = SentenceEncoder(("cls",))
        assert mean_cosine(base, model, texts, first, progress=False) != pytest.approx(expected, abs=1e-4)


def test_hidden_states_that_are_not_finite_and_other_widths_are_refused(texts: Tensor) -> None:
    broken = bert(0)
    with torch.no_grad():
        broken.embeddings.word_embeddings.weight[int(texts[1, 3])] = math.nan
    with pytest.raises(UserError, match=r"^window \d of the evaluated model: the hidden states hold NaN"):
        mean_cosine(bert(0), broken, texts, SentenceEncoder(), progress=False)
    with pytest.raises(UserError, match="the base's embeddings have 48 values, the model's 24"):
        mean_cosine(bert(0), bert(0, hidden=24), texts, SentenceEncoder(), progress=False)
