"""How far one language model's predictions lie from another's, window by window.

At every scored position, with p the base model's distribution over the vocabulary and q the compressed one's,

    KL(p || q) = sum_v p_v (log p_v - log q_v)      in nats per token (Kullback & Leibler 1951)

beside the perplexity exp(mean -log q[target]) of both and the share of positions where both put the same token first;
llama.cpp's --kl-divergence reports the same figures. A causal model is scored on every token after the first of a
window. A masked model is scored on a seeded 15% of the tokens, replaced by the mask token: a pseudo-perplexity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from reallm.errors import UserError

MASK_SHARE = 0.15  # BERT, arXiv 1810.04805
ROWS_AT_ONCE = 128
"""Positions whose distributions are held at once: 128 x 49152 floats are 25 MB."""
MAX_NATS = 700.0
"""Mean losses beyond this have no perplexity in float64."""
PERCENTILES = {"median": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p999": 0.999}


@dataclass(frozen=True)
class Divergence:
    """Distribution of KL(base || model) over the scored positions, nats per token, and agreement on the first token."""

    mean: float
    median: float
    p90: float
    p95: float
    p99: float
    p999: float
    max: float
    same_top1: float
    """Share of positions, 0 to 1, where both models put the same token first."""


@dataclass(frozen=True)
class Comparison:
    """What `compare_models` measured; the base's figures are None when there was no base."""

    windows: int
    seqlen: int
    tokens: int
    """Scored positions."""
    perplexity: float
    base_perplexity: float | None
    divergence: Divergence | None


@dataclass(frozen=True)
class Scored:
    """One window as a model sees it, and where it is scored."""

    inputs: Tensor
    """Int64 [1, seqlen]."""
    positions: Tensor
    """Int64 [P]: rows of the logits."""
    targets: Tensor
    """Int64 [P]: the token to be predicted there."""


class CachedLogits:
    """A model to compare others with on the same windows: its logits are computed once and kept on the CPU.

    A window of 1024 tokens and a vocabulary of 49152 takes 200 MB.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.device, self.known = model, model.device, dict[bytes, Tensor]()

    def eval(self) -> None:
        """As a model's."""
        self.model.eval()

    def __call__(self, input_ids: Tensor) -> SimpleNamespace:
        key = input_ids.cpu().numpy().tobytes()
        if key not in self.known:
            self.known[key] = self.model(input_ids=input_ids).logits.cpu()
        return SimpleNamespace(logits=self.known[key])


def compare_models(
    base: PreTrainedModel | CachedLogits | None,
    model: PreTrainedModel,
    windows: Tensor,
    *,
    mask_token: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    """Score `model`, against `base` where given, on windows int64 [n, seqlen]; one window's logits in memory at a time.

    `mask_token` makes it a masked evaluation (encoders). Both models run in the dtype and on the device they are in;
    distributions are taken in float32. Raises UserError when logits are not finite or the vocabularies differ.
    """
    rows = []
    for index, window in enumerate(tqdm(windows, desc="evaluate", unit="window", disable=not progress)):
        scored = mask_window(window, mask_token, seed + index) if mask_token is not None else causal_window(window)
        logits = _logits(model, scored, f"window {index + 1} of the evaluated model")
        base_logits = None if base is None else _logits(base, scored, f"window {index + 1} of the base model")
        if base_logits is not None and base_logits.shape != logits.shape:
            raise UserError(f"the base has a vocabulary of {base_logits.shape[1]}, the model {logits.shape[1]}")
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


def causal_window(window: Tensor) -> Scored:
    """Every token after the first, predicted from those before it."""
    length = window.numel()
    return Scored(window[None], torch.arange(length - 1), window[1:])


def mask_window(window: Tensor, mask_token: int, seed: int) -> Scored:
    """A seeded MASK_SHARE of the tokens (at least one), each replaced by `mask_token` and predicted from all others."""
    generator = torch.Generator().manual_seed(seed)
    count = max(1, round(MASK_SHARE * window.numel()))
    positions = torch.randperm(window.numel(), generator=generator)[:count].sort().values
    inputs = window.clone()
    inputs[positions] = mask_token
    return Scored(inputs[None], positions, window[positions])


@torch.inference_mode()
def _logits(model: PreTrainedModel | CachedLogits, scored: Scored, what: str) -> Tensor:
    """Logits [P, vocabulary] at the scored positions, on the CPU, in the model's dtype."""
    model.eval()
    rows = scored.positions.to(model.device)
    logits: Tensor = model(input_ids=scored.inputs.to(model.device)).logits[0].index_select(0, rows).cpu()
    if not bool(logits.isfinite().all()):
        raise UserError(f"{what}: the logits hold NaN or infinity; check the weights, or evaluate with --dtype float32")
    return logits


def _score(logits: Tensor, base_logits: Tensor | None, targets: Tensor) -> Tensor:
    """Float64 [P, 4]: -log q[target], -log p[target], KL(p || q), and 1 where both agree on the first token.

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
