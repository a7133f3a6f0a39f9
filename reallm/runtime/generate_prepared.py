"""Continue a text with an artifact by what was kept of it (`prepared`), without transformers."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from reallm.artifacts.find import find_artifact
from reallm.artifacts.verify import verify
from reallm.errors import UserError
from reallm.system.threads import one_thread

from .prepared import PreparedModel, prepared_model, read_tokenizer
from .step.cpu import Step

LOG = logging.getLogger(__name__)


def continue_prepared(path: str | Path, prompt: str, max_new_tokens: int) -> str | None:
    """The prompt and its most likely continuation; None if transformers is needed.

    That is so for a model that is not an artifact, for its first text, and for prompts that `generate` refuses.
    Raises UserError for an artifact that is damaged or was changed, and for logits that are not finite.
    """
    folder = find_artifact(path)
    prepared = None if folder is None else prepared_model(folder)
    if folder is None or prepared is None:
        return None
    verify(folder, adapters=False)
    tokenizer = read_tokenizer(folder)
    ids = _tokens(tokenizer, prompt, prepared)
    if ids is None:
        return None
    limit = len(ids) + max_new_tokens
    if prepared.positions is not None and prepared.positions < limit:
        limit = prepared.positions
    text = _decode(prepared.step(folder), ids, limit, frozenset(prepared.ends))
    if len(text) == prepared.positions and len(text) < len(ids) + max_new_tokens and text[-1] not in prepared.ends:
        warn_of_end(path, prepared.positions)
    decoded: str = tokenizer.decode(text, skip_special_tokens=True)
    return decoded


def warn_of_end(path: str | Path, positions: int | None) -> None:
    """Log that a text ends where the model's positions end."""
    LOG.warning("the text ends here because %s has only %d positions", path, positions)


def check_finite(scores: Tensor, tokens: int) -> None:
    """Raise UserError if `scores`, which follow `tokens` tokens, hold NaN or +infinity, or only -infinity."""
    if not bool(torch.isfinite(scores.max())):  # the maximum is NaN if any score is
        raise UserError(
            f"the logits of token {tokens + 1} hold NaN or infinity; check the weights, or generate in float32"
        )


def _tokens(tokenizer: Tokenizer, prompt: str, prepared: PreparedModel) -> list[int] | None:
    """The tokens of the prompt; None if it has none or too many, or if one of them is not in the vocabulary."""
    try:
        prompt.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return None
    ids: list[int] = tokenizer.encode(prompt).ids
    if not ids or max(ids) >= prepared.vocabulary:
        return None
    return None if prepared.positions is not None and len(ids) >= prepared.positions else ids


def _decode(step: Step, ids: list[int], limit: int, ends: frozenset[int]) -> list[int]:
    """`ids` and the most likely tokens after them, up to one of `ends` or `limit` tokens."""
    text, new = list(ids), torch.tensor(ids, dtype=torch.int64)
    step.reserve(limit)
    with one_thread(), torch.no_grad():  # torch does little between two tokens, and its idle threads would spin
        while True:
            logits = step.run(new)
            check_finite(logits, len(text))
            text.append(int(np.argmax(logits.numpy())))
            if text[-1] in ends or len(text) == limit:
                return text
            new = torch.tensor(text[-1:], dtype=torch.int64)
