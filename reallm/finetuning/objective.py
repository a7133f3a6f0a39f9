"""The divergence of two language models without their logits in memory: head, softmax and gradient a few tokens a time.

    loss = sum_t w_t KL(p_t || q_t),   q_t = softmax(W h_t),   dloss / dh_t = w_t W^T (q_t - p_t),   sum_t w_t = 1

p is the original's, or all at the text's own next token ("text": the cross entropy). A vocabulary of 49,152 makes five
tensors of 100 MB out of 512 tokens otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, linear
from transformers import PreTrainedModel

from .embedding_maps import EmbeddingMaps
from .teacher import Teacher, hidden_state, plain_head

Loss = Literal["kl", "text"]

CHUNK = 128
"""Tokens whose logits exist at once."""


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, target: Callable[[slice], Tensor], weights: Tensor) -> Tensor:
        total, gradient = hidden.new_zeros((), dtype=torch.float32), torch.empty_like(hidden)
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            log_q = linear(hidden[part], head).float().log_softmax(-1)
            wanted = target(part)
            if wanted.ndim == 1:
                losses = -log_q.gather(1, wanted[:, None])[:, 0]
            else:
                p = wanted.exp()
                losses = (p * wanted.sub_(log_q)).sum(-1)
            total += (losses * weights[part]).sum()
            if ctx.needs_input_grad[0]:
                error = log_q.exp_()
                if wanted.ndim == 1:
                    error.scatter_add_(1, wanted[:, None], error.new_full((len(error), 1), -1.0))
                else:
                    error.sub_(p)
                gradient[part] = error.mul_(weights[part, None]).to(head.dtype) @ head
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0], None, None, None


def head_divergence(hidden: Tensor, head: Tensor, original: Tensor, original_head: Tensor, weights: Tensor) -> Tensor:
    """sum_t w_t KL(original || model), nats, float32, from what the two heads are given.

    `hidden`, `original` [..., features of each]; heads [vocabulary, features] get no gradient; `weights` [...] are
    those of the tokens, and add up to one for a mean.
    """
    others = original.flatten(0, -2)
    apply: Callable[..., Tensor] = _HeadLoss.apply

    def target(part: slice) -> Tensor:
        return linear(others[part], original_head).float().log_softmax(-1)

    return apply(hidden.flatten(0, -2), head, target, weights.flatten())


def head_cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """sum_t w_t (-log q_t[label]), nats, float32; `labels` int64 [...], the rest as in `head_divergence`."""
    wanted = labels.flatten()
    apply: Callable[..., Tensor] = _HeadLoss.apply
    return apply(hidden.flatten(0, -2), head, lambda part: wanted[part], weights.flatten())


def token_losses(logits: Tensor, original: Tensor) -> Tensor:
    """KL(original || model) of every token, nats, float32 [...], from logits [..., vocabulary] of both."""
    log_q, log_p = logits.float().log_softmax(-1), original.float().log_softmax(-1)
    return kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


def token_weights(input_ids: Tensor, scored: Tensor | None, loss: Loss) -> Tensor:
    """The weight of every position's prediction, float32 [batch, seqlen], adding up to one.

    `scored` bool [batch, seqlen] says which tokens are to be predicted; a position predicts the next one.
    """
    weights = torch.ones(input_ids.shape, device=input_ids.device)
    if scored is not None:
        weights[:, :-1] = scored[:, 1:].to(weights)
    if scored is not None or loss == "text":
        weights[:, -1] = 0
    return weights / weights.sum()


class Objective:
    """What is minimised: the loss of `model` on windows of tokens, against `original` or against the text itself."""

    def __init__(self, model: PreTrainedModel, original: Teacher, sample: Tensor, loss: Loss) -> None:
        """`sample`: a few token ids [1, seqlen], on which the head is tried."""
        self.model, self.original, self.loss = model, original, loss
        self.head = plain_head(model, sample.to(model.device))

    def can_remember(self, input_ids: Tensor, names: Sequence[int]) -> bool:
        """Make all that the original's weights are needed for on these windows; False where they are needed again."""
        return self.loss == "text" or (self.head is not None and self.original.keep_all(input_ids, names))

    def __call__(
        self, input_ids: Tensor, names: Sequence[int], scored: Tensor | None = None, maps: EmbeddingMaps | None = None
    ) -> Tensor:
        """Mean loss over the tokens, nats, float32, of windows int64 [batch, seqlen] that are called `names`.

        `scored` as in `token_weights`; `maps` are those being trained.
        """
        weights = token_weights(input_ids, scored, self.loss)
        own, others = self.head, self.original.head
        if own is None or others is None:
            return self._by_logits(input_ids, weights)
        hidden = hidden_state(self.model, input_ids)
        if maps is not None:
            hidden = maps.head_input(hidden)
        head = own.weight.to(hidden.dtype)
        if self.loss == "text":
            return head_cross_entropy(hidden, head, input_ids.roll(-1, 1), weights)
        original = self.original.states(input_ids, names)
        return head_divergence(hidden, head, original, others.weight.to(original.dtype), weights)

    def _by_logits(self, input_ids: Tensor, weights: Tensor) -> Tensor:
        logits = self.model(input_ids=input_ids).logits
        if self.loss == "text":
            labels = input_ids.roll(-1, 1)
            losses = cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
        else:
            with torch.no_grad():
                original = self.original.runner(input_ids=input_ids).logits
            losses = token_losses(logits, original)
        return (losses * weights).sum()
