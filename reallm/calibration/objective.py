"""The loss whose gradients calibration follows: the negative log-likelihood of labels sampled from the model itself.

With such labels the second moment of the gradients is the Fisher information (the empirical one of the text's own
labels is not; Kunstner et al., arXiv 1905.12558).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reallm.models.loaded import LoadedModel, Matrix
from reallm.models.sentence_encoder import SentenceEncoder
from reallm.text.masking import mask_windows
from reallm.text.windows import check_vocabulary

from .hooks import StatisticsHooks
from .text_objective import EmbeddingObjective, TextStatisticsHooks

MAX_NATS = 700.0
"""Upper bound of a reported loss in nats per token, so that the perplexity exp(loss) does not overflow."""


class Objective:
    """The inputs and losses of a model on token `windows` [n, seqlen], and the statistics that belong to them."""

    def __init__(
        self, loaded: LoadedModel, windows: Tensor | Sequence[Tensor], seed: int, *, masked: bool = False
    ) -> None:
        """Prepare the inputs; `masked` says that the windows are already masked (for an encoder)."""
        self.loaded, self.tokens, self.seed, self.device = loaded, windows, seed, loaded.model.device
        self.notes: list[str] = []
        self.inputs: Tensor | Sequence[Tensor] = windows
        """The token ids that the model reads: the windows, masked for an encoder, int64 [seqlen] each."""
        self.scored: Tensor | None = None
        """The tokens on which a masked language model's loss is computed, bool [n, seqlen]; None for all tokens."""
        if loaded.is_encoder and not masked:
            assert isinstance(windows, Tensor)
            self._mask(windows)

    def _mask(self, windows: Tensor) -> None:
        token = getattr(self.loaded.tokenizer, "mask_token_id", None)
        if token is None:
            self.notes.append("the tokenizer has no mask token: all tokens are scored unmasked")
            self.scored = torch.ones_like(windows, dtype=torch.bool)
        else:
            check_vocabulary(torch.tensor(token), self.loaded.tokenizer, self.loaded.vocabulary, "the mask token")
            self.inputs, self.scored = mask_windows(windows, int(token), self.seed)

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.inputs)

    @property
    def token_count(self) -> int:
        """Number of tokens in all windows."""
        return sum(window.numel() for window in self.tokens)

    def keywords(self, window: int) -> dict[str, Tensor]:
        """The tensors that the model is called with, by keyword."""
        return {"input_ids": self.inputs[window][None].to(self.device)}

    def hooks(self, matrices: Sequence[Matrix], sums: Mapping[str, Tensor] | None = None) -> StatisticsHooks:
        """Hooks that gather the statistics of `matrices`, starting from the `sums` of earlier passes."""
        return StatisticsHooks(self.loaded, matrices, self.token_count, sums)

    def scores(self, output: Any) -> Tensor:
        """The model's scores for every token, [1, seqlen, vocabulary]."""
        logits: Tensor = output.logits
        return logits

    def losses(self, output: Any, window: int, generator: torch.Generator) -> tuple[Tensor, float, int]:
        """(summed loss on sampled labels, summed loss on the text, number of tokens in the latter sum)."""
        scores, text = self.scores(output)[0].float(), self.tokens[window].to(self.device)
        with torch.no_grad():
            sampled = torch.multinomial(scores.softmax(-1).cpu(), 1, generator=generator).squeeze(1).to(self.device)
        if self.scored is not None:
            mask = self.scored[window]
            sampled_loss = nn.functional.cross_entropy(scores[mask], sampled[mask], reduction="sum")
            text_loss = nn.functional.cross_entropy(scores[mask].detach(), text[mask], reduction="sum")
            return sampled_loss, float(text_loss), int(mask.sum())
        sampled_loss = nn.functional.cross_entropy(scores, sampled, reduction="sum")
        text_loss = nn.functional.cross_entropy(scores[:-1].detach(), text[1:], reduction="sum")
        return sampled_loss, float(text_loss), len(text) - 1


class TextObjective(Objective):
    """The same for an encoder that gives one embedding per text; each window is a text."""

    def __init__(self, loaded: LoadedModel, encoder: SentenceEncoder, windows: Tensor, seed: int) -> None:
        super().__init__(loaded, windows, seed, masked=True)
        self.embeddings = EmbeddingObjective(encoder, windows, loaded.tokenizer)
        self.inputs, self.notes = self.embeddings.inputs, self.embeddings.notes()

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.inputs)

    @property
    def token_count(self) -> int:
        """Number of tokens in all windows."""
        return sum(window.numel() for window in self.tokens)

    def keywords(self, window: int) -> dict[str, Tensor]:
        """The tensors that the model is called with, by keyword."""
        return {"input_ids": self.inputs[window][None].to(self.device)}

    def hooks(self, matrices: Sequence[Matrix], sums: Mapping[str, Tensor] | None = None) -> StatisticsHooks:
        return TextStatisticsHooks(self.loaded, matrices, len(self.tokens), sums)

    def scores(self, output: Any) -> Tensor:
        """The hidden states of every token, [1, seqlen, hidden]."""
        hidden: Tensor = output.last_hidden_state
        return hidden

    def losses(self, output: Any, window: int, generator: torch.Generator) -> tuple[Tensor, float, int]:
        """(loss on a sampled label, 0, 0): there is no loss on the text."""
        return self.embeddings.losses(output, generator), 0.0, 0


class ImageObjective(Objective):
    """The same for texts with images: every window is what the model's processor made of one of them.

    Tokens that stand for parts of an image are not predicted, so no loss is taken there.
    """

    def __init__(self, loaded: LoadedModel, inputs: Sequence[Mapping[str, Tensor]], placeholders: Tensor, seed: int):
        """Take the processor's `inputs`, one mapping per text, and the ids of the tokens that stand for images."""
        tokens = [each["input_ids"][0] for each in inputs]
        super().__init__(loaded, tokens, seed, masked=True)
        self.processed = inputs
        self.predicting = [~torch.isin(ids, placeholders) for ids in tokens]
        """The tokens whose successor the model predicts, bool [seqlen] for each window."""

    def keywords(self, window: int) -> dict[str, Tensor]:
        return {name: tensor.to(self.device) for name, tensor in self.processed[window].items()}

    def losses(self, output: Any, window: int, generator: torch.Generator) -> tuple[Tensor, float, int]:
        scores, text = self.scores(output)[0].float(), self.tokens[window].to(self.device)
        mask = self.predicting[window].to(self.device)
        with torch.no_grad():
            sampled = torch.multinomial(scores[mask].softmax(-1).cpu(), 1, generator=generator).squeeze(1)
        sampled_loss = nn.functional.cross_entropy(scores[mask], sampled.to(self.device), reduction="sum")
        pairs = mask[:-1] & mask[1:]
        text_loss = nn.functional.cross_entropy(scores[:-1][pairs].detach(), text[1:][pairs], reduction="sum")
        return sampled_loss, float(text_loss), int(pairs.sum())


def make_objective(loaded: LoadedModel, windows: Tensor, seed: int, *, masked: bool = False) -> Objective:
    """The objective that fits the model; `masked` says that the windows are already masked (for an encoder)."""
    if loaded.sentence_encoder is not None:
        return TextObjective(loaded, loaded.sentence_encoder, windows, seed)
    return Objective(loaded, windows, seed, masked=masked)
