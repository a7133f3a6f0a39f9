"""Calibration text that the model writes itself: windows of tokens, sampled at temperature 1.

The divergence of a compressed model from the original is an expectation under the text. For text x_1 .. x_T that is
sampled from the model p itself, every token is a sample of p(. | x_1 .. x_{t-1}), so no other text is needed (used for
the same purpose by LLM-QAT, arXiv 2305.17888, and studied for calibration by arXiv 2410.17170). With u uniform in
[0, 1), the next token is the first v with

    p_0 + p_1 + ... + p_v > u

Each window has a random generator of its own, so the windows do not depend on how many are written at the same time,
up to rounding in the logits. The sampled ids are the windows: they are not decoded and tokenised again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from reallm.errors import UserError, raised_by_library
from reallm.models.limits import vocabulary_size
from reallm.models.probe import eager_experts

from .special_tokens import added_tokens

MEDIA = ("image", "video", "audio", "vision")
"""Prefixes of the names, in a configuration, of tokens that stand for something other than text."""


@dataclass(frozen=True)
class Start:
    """How a text of a model begins and ends."""

    tokens: tuple[int, ...]
    """Ids that every text begins with, at least one."""
    ends: frozenset[int]
    """Ids after which a new text begins."""
    origin: str
    """Where `tokens` come from, for messages."""


def text_start(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Start | None:
    """How texts of `model` begin: as the first of these says that is known, or None if none is.

    The tokens that the tokenizer puts before a text; its BOS token; the BOS token in the generation settings or the
    configuration; the EOS token, which many models without BOS were trained to find between texts.
    """
    settings = model.generation_config
    before, _ = added_tokens(tokenizer)
    eos = [*_ids(tokenizer.eos_token_id), *_ids(None if settings is None else settings.eos_token_id)]
    configured = getattr(model.config.get_text_config(), "bos_token_id", None)
    sources = (
        (before, "as its tokenizer begins a text"),
        (_ids(tokenizer.bos_token_id), "its BOS token"),
        (_ids(None if settings is None else settings.bos_token_id), "the BOS token of its generation settings"),
        (_ids(configured), "the BOS token of its configuration"),
        (eos[:1], "its EOS token, as it has no BOS token"),
    )
    rows = vocabulary_size(model)
    for tokens, origin in sources:
        if tokens and all(rows is None or 0 <= token < rows for token in tokens):
            return Start(tuple(tokens), frozenset(eos) - frozenset(tokens), origin)
    return None


def _ids(value: int | Sequence[int] | None) -> list[int]:
    """The ids in a setting that holds one, several or none."""
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)


def write_windows(
    model: PreTrainedModel,
    start: Start,
    indices: Sequence[int],
    seqlen: int,
    *,
    seed: int = 0,
    bar: tqdm[None] | None = None,
) -> Tensor:
    """Let `model` write the windows `indices` at once: token ids, int64 [len(indices), seqlen].

    Window i depends only on `seed`, i and the model. Each begins with the tokens of `start`, and where a text ends
    within a window, another begins there. The progress is shown on `bar`, in tokens, if given. Raises UserError for a
    model that fails when it generates, or whose logits are not finite.
    """
    model.eval()
    sampler = _Sampler(model, start, indices, seed, bar)
    prompt = torch.tensor(start.tokens[:seqlen]).repeat(len(indices), 1)
    if bar is not None:
        bar.update(prompt.numel())
    if prompt.shape[1] == seqlen:
        return prompt
    prompt = prompt.to(model.device)
    try:
        with torch.no_grad(), eager_experts(model), _plain_generation(model):
            ids = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=GenerationConfig(
                    max_new_tokens=seqlen - prompt.shape[1], do_sample=False, use_cache=True, pad_token_id=prompt[0, 0]
                ),
                logits_processor=LogitsProcessorList([sampler]),
            )
    except Exception as error:  # a model raises what its code raises
        if isinstance(error, UserError) or not raised_by_library(error):
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{type(model).__name__} cannot write its calibration text ({reason}); give a text file with --text"
        ) from error
    result: Tensor = ids.cpu()
    return result


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Within the context, the model's own generation settings (penalties, top-k, ...) have no effect."""
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


class _Sampler:
    """A logits processor that samples the next token of every window, and leaves no other token possible."""

    def __init__(
        self, model: PreTrainedModel, start: Start, indices: Sequence[int], seed: int, bar: tqdm[None] | None
    ) -> None:
        self.start, self.bar, self.rows = start, bar, vocabulary_size(model)
        self.excluded = media_tokens(model)
        self.generators = [torch.Generator().manual_seed(window_seed(seed, index)) for index in indices]
        self.placed = [len(start.tokens)] * len(indices)
        """For every window, how many of the tokens of `start` its newest text has."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [n, vocabulary]: 0 for the next token of each window, -infinity for all others."""
        result = torch.full_like(scores, -torch.inf)
        count = scores.shape[1] if self.rows is None else min(self.rows, scores.shape[1])
        logits = scores[:, :count].float().cpu()
        logits[:, self.excluded] = -torch.inf
        if not bool(logits.amax(dim=1).isfinite().all()):
            raise UserError(
                f"the model's logits of token {input_ids.shape[1] + 1} are not finite; check its weights, or give a "
                "text file with --text"
            )
        cumulative = logits.softmax(dim=1).cumsum(dim=1, dtype=torch.float64)
        drawn = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in self.generators])
        chosen = torch.searchsorted(cumulative, drawn * cumulative[:, -1:], right=True)[:, 0].clamp_(max=count - 1)
        for row, last in enumerate(input_ids[:, -1].tolist()):
            if last in self.start.ends:
                self.placed[row] = 0
            if self.placed[row] < len(self.start.tokens):
                chosen[row] = self.start.tokens[self.placed[row]]
                self.placed[row] += 1
        if self.bar is not None:
            self.bar.update(len(chosen))
        return result.scatter_(1, chosen[:, None].to(scores.device), 0.0)


def window_seed(seed: int, index: int) -> int:
    """The seed of the random generator of window `index`."""
    return int.from_bytes(hashlib.sha256(f"{seed} {index}".encode()).digest()[:7])


def media_tokens(model: PreTrainedModel) -> list[int]:
    """Ids of the tokens that stand for images, video or sound, which a text must not contain."""
    names = {
        name: value
        for name, value in vars(model.config).items()
        if name.startswith(MEDIA) and name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    rows = vocabulary_size(model)
    return sorted({value for value in names.values() if value >= 0 and (rows is None or value < rows)})
