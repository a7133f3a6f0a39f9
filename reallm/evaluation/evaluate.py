"""`reallm eval`: what a compressed model costs in quality, and what it weighs.

Protocol (WikiText-2's, and llama.cpp's for the divergence): the text is tokenised once and cut into consecutive windows
of `seqlen` tokens, the last partial one dropped; every token after the first of a window is scored with no more context
than its window. Always state the context: figures at 1024 and 2048 are not comparable. See `reallm.evaluation.compare`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from reallm.errors import UserError
from reallm.kernels.storage.atomic import canonical_json
from reallm.models.loaded import max_positions
from reallm.models.sizes import Sizes
from reallm.runtime.open_model import RunnableModel, open_model
from reallm.system.memory import peak_rss_bytes
from reallm.text.corpus import Text, load_text
from reallm.text.corpus import windows as cut_windows

from .compare import MASK_SHARE, Comparison, compare_models

MIN_SEQLEN = 8


@dataclass(frozen=True)
class Evaluation:
    """Everything `evaluate` measured, and from what."""

    model: str
    against: str | None
    text: str
    text_sha256: str
    dtype: str
    """The dtype both models computed in."""
    comparison: Comparison
    sizes: Sizes
    base_sizes: Sizes | None
    seconds: float
    peak_rss_bytes: int
    notes: tuple[str, ...]
    versions: dict[str, str]
    adapter: str | None = None
    """That it was measured with; the sizes leave out its bytes."""

    def to_json(self) -> str:
        """Canonical JSON of every field."""
        return canonical_json(asdict(self))


def evaluate(
    path: str | Path,
    *,
    against: str | Path | None = None,
    text: str | None = None,
    seqlen: int = 1024,
    windows: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    seed: int = 0,
    progress: bool = True,
    adapter: str | Path | None = None,
) -> Evaluation:
    """Measure the model at `path` (an artifact, or any model) on `text`, against the model `against` where given.

    `seqlen` is the context in tokens, `windows` the most windows to score (None: the whole text), `seed` chooses
    the masked tokens of an encoder. `adapter` is a LoRA or DoRA adapter to an artifact, as for `load`. Raises UserError
    on unreadable models, too little text, logits that are not finite.
    """
    began = time.perf_counter()
    if seqlen < MIN_SEQLEN or (windows is not None and windows < 1):
        raise UserError(f"--seqlen {seqlen} --windows {windows}: expected at least {MIN_SEQLEN} tokens and 1 window")
    source = load_text(text, split="test")
    opened = open_model(path, dtype, device, adapter)
    base = open_model(against, dtype, device) if against is not None else None
    if base is not None and base.tokenizer.get_vocab() != opened.tokenizer.get_vocab():
        raise UserError(
            f"{path} and {against} have different vocabularies; --against must name the model it was made from"
        )
    tokens = cut_windows(source, opened.tokenizer, None, seqlen, max_positions=max_positions(opened.model))
    mask = _mask_token(opened, path)
    comparison = compare_models(
        base.model if base else None,
        opened.model,
        tokens[:windows],
        mask_token=mask,
        seed=seed,
        progress=progress,
    )
    return Evaluation(
        model=str(path),
        against=None if against is None else str(against),
        text=source.description,
        text_sha256=source.sha256,
        dtype=dtype,
        comparison=comparison,
        sizes=opened.sizes,
        base_sizes=base.sizes if base else None,
        seconds=time.perf_counter() - began,
        peak_rss_bytes=peak_rss_bytes(),
        notes=tuple(_notes(source, mask, adapter)),
        versions={name: version(name) for name in ("reallm", "torch", "transformers")},
        adapter=None if adapter is None else str(adapter),
    )


def _mask_token(opened: RunnableModel, path: str | Path) -> int | None:
    """The mask token of an encoder; None for a model that generates."""
    if opened.model.can_generate():
        return None
    mask: int | None = opened.tokenizer.mask_token_id
    if mask is None:
        raise UserError(f"{path} neither generates nor has a mask token; eval takes causal and masked language models")
    return mask


def _notes(text: Text, mask: int | None, adapter: str | Path | None) -> Iterator[str]:
    """What the reader of the figures must know."""
    if text.is_fallback:
        yield "this text comes with Python and is no benchmark; give --text for figures to compare"
    if adapter is not None:
        yield f"with the adapter {adapter}, whose bytes the sizes leave out"
    if mask is not None:
        yield f"an encoder: pseudo-perplexity of a seeded {MASK_SHARE:.0%} of the tokens, masked"
