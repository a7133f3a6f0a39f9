"""Calibration of encoders without an output layer for tokens: one loss per text instead of one per token.

The output of such a model on a text is its embedding y, a vector of unit length (see `models.sentence_encoder`), and
the loss of another embedding y' is

    1 - cos(y, y') = 1/2 |y - y'|^2.

It is the negative log-likelihood of y under a normal distribution of unit variance around y', up to a constant. A label
sampled from the model is therefore y + e with e normal, the gradient of the loss at y is -e, and its second moment over
e is the Gauss-Newton matrix J^T J = Fisher information of the weights. Costs are then in units of 1 - cosine per text.

All tokens of a text share one e, so that the gradient with respect to a weight is a sum over tokens that do not average
out: with inputs x_t and output gradients g_t, the gradient of a text is D = sum_t g_t x_t^T, and over the n texts

    H_guided = 1/n sum D^T D / N,    F = 1/n sum D^2,    G = 1/n sum D D^T / K

for a matrix [N, K] (K-FAC-reduce, arXiv 2311.00636, with the products over tokens kept exact). Sums over squares of
single tokens, as for language models, would underrate errors in the direction of the mean input by the text's length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reallm.models.loaded import Matrix
from reallm.models.sentence_encoder import SentenceEncoder
from reallm.text.special_tokens import with_special_tokens

from .hooks import StatisticsHooks, add_moment

FEW_TEXTS = 512
"""Fewer calibration texts than this are too few: a text gives one sample of the gradient, as a token does elsewhere."""


class EmbeddingObjective:
    """The inputs and the sampled loss of an encoder that gives one embedding per text."""

    def __init__(self, encoder: SentenceEncoder, windows: Tensor, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Take `windows` [n, seqlen] as n texts; `inputs` are these with the tokenizer's special tokens at the ends."""
        self.encoder = encoder
        self.inputs = with_special_tokens(windows, tokenizer)
        """What the model reads, int64 [n, seqlen]."""

    def losses(self, output: Any, generator: torch.Generator) -> Tensor:
        """The loss of one text on a sampled label, a scalar with gradients.

        `output` is the model's output on one window, with `last_hidden_state` [1, seqlen, hidden].
        """
        embedding = self.encoder.embed(output.last_hidden_state)
        noise = torch.randn(embedding.shape, generator=generator).to(embedding.device)
        return (embedding - embedding.detach() - noise).square().sum() / 2

    def notes(self) -> list[str]:
        """Notes for the user: the unit of all costs, and whether there are too few texts."""
        pooling = " and ".join(self.encoder.modes)
        unit = (
            f"costs and losses are 1 - cosine of its embedding per text ({pooling} of the tokens), not nats per token"
        )
        notes = [f"an encoder without an output layer for tokens: {unit}"]
        if len(self.inputs) < FEW_TEXTS:
            length = self.inputs.shape[1]
            advice = "use at least 1024 texts as long as yours, such as --nsamples 1024 --seqlen 64"
            notes.append(f"{len(self.inputs)} windows of {length} tokens are few texts for an encoder: {advice}")
        return notes


class TextStatisticsHooks(StatisticsHooks):
    """Accumulates the statistics from the gradients of whole texts; `tokens` is then the number of texts.

    Every recorded pass must be that of one text.
    """

    def _receiver(self, matrix: Matrix, value: Tensor) -> Callable[[Tensor], None]:
        """A function that takes the gradient of an output and updates the sums of `matrix` with it and `value`."""
        x = self._input(matrix, value)

        def receive(gradient: Tensor) -> None:
            g = gradient.detach().float().reshape(-1, matrix.rows)
            guided = self._sum(f"guided/{matrix.name}", matrix.cols, matrix.cols)
            add_moment(guided, (g @ g.T / matrix.rows) @ x, x, 1 / self.tokens)
            fisher = self._sum(f"fisher/{matrix.name}", matrix.rows, matrix.cols)
            fisher.add_((g.T @ x).square_(), alpha=1 / self.tokens)
            if matrix.kind in ("linear", "expert"):
                gram = self._sum(f"gram/{matrix.name}", matrix.rows, matrix.rows)
                add_moment(gram, (x @ x.T / matrix.cols) @ g, g, 1 / self.tokens)
                self._sum(f"count/{matrix.name}", 1).add_(len(x))

        return receive

    def on_lookup(self, ids: Tensor, weight: Tensor, output: Tensor) -> Tensor:
        """As in StatisticsHooks, but a row that a text looks up several times has one gradient, the sum."""
        matrix = next((m for m, parameter in self._embeddings if parameter.data_ptr() == weight.data_ptr()), None)
        if matrix is None:
            return output
        rows, places = torch.unique(ids.reshape(-1), return_inverse=True)
        leaf = output.detach().requires_grad_()

        def receive(gradient: Tensor) -> None:
            sums = torch.zeros(len(rows), matrix.cols)
            sums.index_add_(0, places, gradient.detach().float().reshape(len(places), -1))
            total = self._sum(f"lookup/{matrix.name}", matrix.rows, matrix.cols)
            total.index_add_(0, rows, sums.square_().div_(self.tokens))

        leaf.register_hook(receive)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        return leaf.clone()  # a model may change it in place, which a leaf does not allow
