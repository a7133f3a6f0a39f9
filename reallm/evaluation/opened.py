"""The figures of a loaded model, by what it gives for a text: predictions of tokens, embeddings, or both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from reallm.errors import UserError
from reallm.models.sentence_encoder import SentenceEncoder, gives_embeddings, read_sentence_encoder
from reallm.models.source import locate
from reallm.runtime.open_model import RunnableModel
from reallm.text.masking import mask_token_of
from reallm.text.special_tokens import with_special_tokens

from .compare import Comparison, compare_models
from .embeddings import mean_cosine


def check_same_kind(
    opened: RunnableModel, base: RunnableModel | None, path: str | Path, against: str | Path | None
) -> None:
    """Raise UserError if the base's tokens or predictions are of another kind than the model's."""
    if base is None:
        return
    if base.tokenizer.get_vocab() != opened.tokenizer.get_vocab():
        raise UserError(
            f"{path} and {against} have different vocabularies; --against must name the model it was made from"
        )
    if _kind(base.model) != _kind(opened.model):
        raise UserError(
            f"{path} {_kind(opened.model)}, but {against} {_kind(base.model)}; --against must name the model it was "
            "made from"
        )


def _kind(model: PreTrainedModel) -> str:
    """What `model` gives for a text."""
    if gives_embeddings(model):
        return "gives embeddings"
    return "predicts the next token" if model.can_generate() else "predicts masked tokens"


def compare_opened(
    opened: RunnableModel, base: RunnableModel | None, path: str | Path, tokens: Tensor, seed: int, progress: bool
) -> Comparison:
    """The figures on `tokens`, int64 [n, seqlen]: those of the predictions, and for an encoder the cosine as well."""
    model, reference = opened.model, None if base is None else base.model
    count, seqlen = tokens.shape
    if gives_embeddings(model):
        encoder = read_sentence_encoder(locate(path).folder)
        comparison = Comparison(count, seqlen, tokens=0, perplexity=None, base_perplexity=None, divergence=None)
    else:
        encoder, mask = SentenceEncoder(), mask_token_of(model, opened.tokenizer, str(path))
        comparison = compare_models(reference, model, tokens, mask_token=mask, seed=seed, progress=progress)
    if reference is None or model.can_generate():
        return comparison
    texts = with_special_tokens(tokens, opened.tokenizer)
    return replace(comparison, cosine=mean_cosine(reference, model, texts, encoder, progress=progress))
