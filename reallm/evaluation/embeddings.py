"""How far the sentence embeddings of an encoder are from those of the model that it was made from."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reallm.errors import UserError
from reallm.models.sentence_encoder import SentenceEncoder
from reallm.system.progress import progress_bar


@torch.inference_mode()
def mean_cosine(
    base: PreTrainedModel,
    model: PreTrainedModel,
    texts: Tensor,
    encoder: SentenceEncoder,
    *,
    progress: bool = True,
) -> float:
    """The mean cosine between the embeddings of both models of each text; `texts` are token ids, int64 [n, tokens].

    An embedding is what `encoder` makes of the last hidden states (by default their mean over the tokens). The texts
    are not masked. Raises UserError when hidden states are not finite or differ in width.
    """
    total = 0.0
    for index, text in enumerate(progress_bar(texts, desc="embed", unit="window", disable=not progress)):
        embeddings = [
            encoder.embed(_last_hidden_states(each, text, f"window {index + 1} of the {name} model"))
            for each, name in ((base, "base"), (model, "evaluated"))
        ]
        if embeddings[0].shape != embeddings[1].shape:
            widths = [embedding.shape[1] for embedding in embeddings]
            raise UserError(
                f"the base's embeddings have {widths[0]} values, the model's {widths[1]}; expected the model that it "
                "was made from as the base"
            )
        total += float((embeddings[0].double() * embeddings[1].double()).sum())
    return total / len(texts)


def _last_hidden_states(model: PreTrainedModel, text: Tensor, what: str) -> Tensor:
    """The output of the last block on one text, float32 [1, tokens, hidden], on the CPU."""
    model.eval()
    ids = text[None].to(model.device)
    hidden: Tensor = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.cpu()
    if not bool(hidden.isfinite().all()):
        raise UserError(
            f"{what}: the hidden states hold NaN or infinity; check the weights, or evaluate with --dtype float32"
        )
    return hidden.float()
