"""The loss between two language models, computed in chunks of tokens so that the full logits never exist in memory.

    loss = sum_t w_t KL(p_t || q_t),   q_t = softmax(W h_t),   dloss / dh_t = w_t W^T (q_t - p_t),   sum_t w_t = 1

p is the teacher's distribution, or with the loss "text" all on the text's next token, which gives the cross entropy.
For 512 tokens and a vocabulary of 49,152, each of the five logit tensors that the chunks avoid would take 100 MB.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, linear
from transformers import PreTrainedModel

from .embedding_maps import EmbeddingMaps
from .settings import Loss
from .teacher import Teacher, hidden_state, plain_head

CHUNK = 128
"""Number of tokens per chunk, whose logits are in memory at the same time."""


class _HeadLoss(torch.autograd.Function):
    """Loss and gradient in one pass. `target(tokens)` returns, for a slice of tokens, labels [n] or log p [n,
    vocabulary].
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, target: Callable[[slice], Tensor], weights: Tensor) -> Tensor:
        total, gradient = hidden.new_zeros((), dtype=torch.float32), torch.empty_like(hidden)
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            log_q = linear(hidden[part], head).float().log_softmax(-1)
            expected = target(part)
            if expected.ndim == 1:
                losses = -log_q.gather(1, expected[:, None])[:, 0]
            else:
                p = expected.exp()
                losses = (p * expected.sub_(log_q)).sum(-1)
            total += (losses * weights[part]).sum()
            if ctx.needs_input_grad[0]:
                error = log_q.exp_()
                if expected.ndim == 1:
                    error.scatter_add_(1, expected[:, None], error.new_full((len(error), 1), -1.0))
                else:
                    error.sub_(p)
                gradient[part] = error.mul_(weights[part, None]).to(head.dtype) @ head
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0], None, None, None


def head_divergence(hidden: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, weights: Tensor) -> Tensor:
    """sum_t w_t KL(teacher || model), nats, float32, computed from the hidden states that the two heads multiply.

    `hidden` [..., features] and `teacher` [..., teacher features] are hidden states; the heads [vocabulary, features]
    get no gradient; `weights` [...] are the token weights w_t, which add up to one for a mean.
    """
    teacher_states = teacher.flatten(0, -2)
    apply: Callable[..., Tensor] = _HeadLoss.apply

    def target(part: slice) -> Tensor:
        return linear(teacher_states[part], teacher_head).float().log_softmax(-1)

    return apply(hidden.flatten(0, -2), head, target, weights.flatten())


def head_cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """sum_t w_t (-log q_t[label_t]), nats, float32. `labels` is int64 [...]; the others are as in `head_divergence`."""
    flat_labels = labels.flatten()
    apply: Callable[..., Tensor] = _HeadLoss.apply
    return apply(hidden.flatten(0, -2), head, lambda part: flat_labels[part], weights.flatten())


def token_losses(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || model) of every token, nats, float32 [...], from the logits [..., vocabulary] of both models."""
    log_q, log_p = logits.float().log_softmax(-1), teacher_logits.float().log_softmax(-1)
    return kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


def token_weights(input_ids: Tensor, scored: Tensor | None, loss: Loss) -> Tensor:
    """The weight of the prediction at every position, float32 [batch, seqlen]; the weights add up to one.

    `scored`, bool [batch, seqlen], says which tokens' predictions count; each position predicts the next token.
    """
    weights = torch.ones(input_ids.shape, device=input_ids.device)
    if scored is not None:
        weights[:, :-1] = scored[:, 1:].to(weights)
    if scored is not None or loss == "text":
        weights[:, -1] = 0
    return weights / weights.sum()


class Objective:
    """The loss of `model` on windows of tokens, against `teacher` or against the text itself."""

    def __init__(self, model: PreTrainedModel, teacher: Teacher, sample: Tensor, loss: Loss) -> None:
        """`sample`: a few token ids [1, seqlen], used to check whether the head is a plain matrix."""
        self.model, self.teacher, self.loss = model, teacher, loss
        self.head = plain_head(model, sample.to(model.device))

    def teacher_fits_in_cache(self, input_ids: Tensor, window_ids: Sequence[int]) -> bool:
        """Cache the teacher's states for these windows; return False if the teacher's weights will be needed again."""
        return self.loss == "text" or (self.head is not None and self.teacher.cache_all(input_ids, window_ids))

    def __call__(
        self,
        input_ids: Tensor,
        window_ids: Sequence[int],
        scored: Tensor | None = None,
        maps: EmbeddingMaps | None = None,
    ) -> Tensor:
        """The mean loss per token, in nats, as float32, of the windows `input_ids`, int64 [batch, seqlen].

        `window_ids` are the windows' identifiers, `scored` is as in `token_weights`, and `maps` are the embedding maps
        that are being trained.
        """
        weights = token_weights(input_ids, scored, self.loss)
        student_head, teacher_head = self.head, self.teacher.head
        if student_head is None or teacher_head is None:
            return self._loss_from_logits(input_ids, weights)
        hidden = hidden_state(self.model, input_ids)
        if maps is not None:
            hidden = maps.head_input(hidden)
        head = student_head.weight.to(hidden.dtype)
        if self.loss == "text":
            return head_cross_entropy(hidden, head, input_ids.roll(-1, 1), weights)
        teacher = self.teacher.hidden_states(input_ids, window_ids)
        return head_divergence(hidden, head, teacher, teacher_head.weight.to(teacher.dtype), weights)

    def _loss_from_logits(self, input_ids: Tensor, weights: Tensor) -> Tensor:
        logits = self.model(input_ids=input_ids).logits
        if self.loss == "text":
            labels = input_ids.roll(-1, 1)
            losses = cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
        else:
            with torch.no_grad():
                teacher_logits = self.teacher.runner(input_ids=input_ids).logits
            losses = token_losses(logits, teacher_logits)
        return (losses * weights).sum()
