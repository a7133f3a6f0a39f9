"""Measure how far one language model's predictions are from another's, window by window.

At every scored position, p is the base model's distribution over the vocabulary and q that of the compressed model:

    KL(p || q) = sum_v p_v (log p_v - log q_v)      in nats per token (Kullback & Leibler 1951)

The perplexity of the compressed model is exp(mean -log q[target]), and that of the base is the same with p. Also
reported is the share of positions where both models have the same most likely token. llama.cpp's --kl-divergence
reports the same figures. A causal model is scored on every token after the first of a window. A masked model is scored
on a seeded 15% of the tokens, which are replaced by the mask token; this gives a pseudo-perplexity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from reallm.errors import UserError
from reallm.system.progress import progress_bar
from reallm.text.masking import ScoredWindow, causal_window, mask_window

ROWS_AT_ONCE = 128
"""Positions whose distributions are in memory at once: 128 x 49152 floats are 25 MB."""
MAX_NATS = 700.0
"""Mean losses above this are an error, because the perplexity may overflow float64."""
PERCENTILES = {"median": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p999": 0.999}


@dataclass(frozen=True)
class Divergence:
    """Distribution of KL(base || model) over the scored positions, in nats per token, and top-1 agreement."""

    mean: float
    """Nats per token."""
    median: float
    """Nats per token, like all percentiles below."""
    p90: float
    """90th percentile."""
    p95: float
    """95th percentile."""
    p99: float
    """99th percentile."""
    p999: float
    """99.9th percentile."""
    max: float
    """Largest value at any scored position, nats per token."""
    same_top1: float
    """Share of positions, 0 to 1, where both models have the same most likely token."""


@dataclass(frozen=True)
class Comparison:
    """What `evaluate` measured; `base_perplexity`, `divergence` and `cosine` are None without a base model.

    >>> result = reallm.evaluate("out", text="test.txt", seqlen=32, windows=4, progress=False)
    >>> result.comparison.windows, result.comparison.divergence is None
    (4, True)
    """

    windows: int
    """Number of windows."""
    seqlen: int
    """Context: tokens per window."""
    tokens: int
    """Number of scored positions in all windows."""
    perplexity: float | None
    """exp of the mean loss in nats per token; for an encoder, of the loss on masked tokens. None for a model without an
    output layer for tokens."""
    base_perplexity: float | None
    """The same for the base model."""
    divergence: Divergence | None
    """How far the model's predictions are from the base's; None for a model without an output layer for tokens."""
    cosine: float | None = None
    """Encoders only: mean cosine between the embeddings of each window (not masked) by the base and by the model."""


class CachedLogits:
    """A base model for comparing several models: its logits on each window are computed once and kept on the CPU.

    A window of 1024 tokens takes 200 MB with a vocabulary of 49152 in float32.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.device = model, model.device
        self.logits: dict[bytes, Tensor] = {}
        """Bytes of a window's token ids -> logits [1, seqlen, vocabulary]."""

    def eval(self) -> None:
        """Put the model into evaluation mode."""
        self.model.eval()

    def __call__(self, input_ids: Tensor) -> SimpleNamespace:
        key = input_ids.cpu().numpy().tobytes()
        if key not in self.logits:
            self.logits[key] = self.model(input_ids=input_ids).logits.cpu()
        return SimpleNamespace(logits=self.logits[key])


def compare_models(
    base: PreTrainedModel | CachedLogits | None,
    model: PreTrainedModel,
    windows: Tensor,
    *,
    mask_token: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    """Score `model` on `windows`, int64 [n, seqlen], and compare it with `base` if that is given.

    With `mask_token` (encoders), masked tokens are scored; window i is masked with the seed `seed` + i. Both models run
    in their own dtype and on their own device; distributions are computed in float32, with the logits of one window in
    memory at a time. Raises UserError when logits are not finite or the vocabularies differ.
    """
    rows = []
    for index, window in enumerate(progress_bar(windows, desc="evaluate", unit="window", disable=not progress)):
        scored = mask_window(window, mask_token, seed + index) if mask_token is not None else causal_window(window)
        logits = _logits(model, scored, f"window {index + 1} of the evaluated model")
        base_logits = None if base is None else _logits(base, scored, f"window {index + 1} of the base model")
        if base_logits is not None and base_logits.shape != logits.shape:
            raise UserError(
                f"the base has a vocabulary of {base_logits.shape[1]}, the model {logits.shape[1]}; "
                "expected the model that it was made from as the base"
            )
        rows.append(_score(logits, base_logits, scored.targets))
    nll, base_nll, kl, same = torch.cat(rows).T
    return Comparison(
        windows=len(windows),
        seqlen=windows.shape[1],
        tokens=nll.numel(),
        perplexity=_perplexity(nll),
        base_perplexity=None if base is None else _perplexity(base_nll),
        divergence=None if base is None else _divergence(kl, same),
    )


@torch.inference_mode()
def _logits(model: PreTrainedModel | CachedLogits, scored: ScoredWindow, what: str) -> Tensor:
    """Logits [P, vocabulary] at the scored positions, on the CPU, in the model's dtype."""
    model.eval()
    rows = scored.positions.to(model.device)
    logits: Tensor = model(input_ids=scored.inputs.to(model.device)).logits[0].index_select(0, rows).cpu()
    if not bool(logits.isfinite().all()):
        raise UserError(f"{what}: the logits hold NaN or infinity; check the weights, or evaluate with --dtype float32")
    return logits


def _score(logits: Tensor, base_logits: Tensor | None, targets: Tensor) -> Tensor:
    """Float64 [P, 4]: -log q[target], -log p[target], KL(p || q), and 1 where both have the same top token.

    Logits [P, vocabulary] are taken ROWS_AT_ONCE rows at a time; without a base the last three columns are zero.
    """
    result = torch.zeros(len(logits), 4, dtype=torch.float64)
    for start in range(0, len(logits), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        target = targets[part, None]
        log_q = logits[part].float().log_softmax(1)
        result[part, 0] = -log_q.gather(1, target)[:, 0].double()
        if base_logits is not None:
            log_p = base_logits[part].float().log_softmax(1)
            result[part, 1] = -log_p.gather(1, target)[:, 0].double()
            result[part, 3] = (log_p.argmax(1) == log_q.argmax(1)).double()
            result[part, 2] = log_p.exp().mul_(log_p.sub_(log_q)).sum(1).double()
    return result


def _perplexity(nll: Tensor) -> float:
    mean = float(nll.mean())
    if mean > MAX_NATS:
        raise UserError(f"the mean loss is {mean:.0f} nats per token; expected under {MAX_NATS:.0f}: check the weights")
    return math.exp(mean)


def _divergence(kl: Tensor, same: Tensor) -> Divergence:
    values = kl.numpy()
    tails = {name: float(np.quantile(values, share)) for name, share in PERCENTILES.items()}
    return Divergence(
        mean=float(values.mean()),
        median=tails["median"],
        p90=tails["p90"],
        p95=tails["p95"],
        p99=tails["p99"],
        p999=tails["p999"],
        max=float(values.max()),
        same_top1=float(same.mean()),
    )
