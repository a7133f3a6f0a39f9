"""`reallm eval`: measure the quality and the size of a compressed model.

Perplexity follows the usual protocol for WikiText-2, and the divergence that of llama.cpp. The text is tokenised once
and cut into consecutive windows of `seqlen` tokens; an incomplete last window is dropped. Every token after the first
of a window is scored with the tokens before it in the same window as context. Always state the context length: figures
at 1024 and 2048 tokens are not comparable. See `reallm.evaluation.compare`.
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
from reallm.runtime.open_model import open_model
from reallm.system.memory import peak_rss_bytes
from reallm.text.corpus import Text, load_text
from reallm.text.masking import MASK_SHARE, mask_token_of
from reallm.text.windows import cut_windows

from .compare import Comparison, compare_models

MIN_SEQLEN = 8


@dataclass(frozen=True)
class Evaluation:
    """Everything that `evaluate` measured, and what it was measured on.

    >>> result = reallm.evaluate("out", text="test.txt", seqlen=32, windows=4, progress=False)
    >>> result.dtype
    'float32'
    """

    model: str
    """The model or artifact, as the user named it."""
    against: str | None
    """The base model it was compared with, as the user named it."""
    text: str
    """Description of the text."""
    text_sha256: str
    """Digest of the text's documents."""
    dtype: str
    """The dtype both models computed in."""
    comparison: Comparison
    """Perplexities, and divergence in nats per token."""
    sizes: Sizes
    """Bytes and bits per weight of the model."""
    base_sizes: Sizes | None
    """Bytes and bits per weight of the base model."""
    seconds: float
    """Wall-clock time of the evaluation, including the loading of the models."""
    peak_rss_bytes: int
    """Peak resident memory of the process, in bytes."""
    notes: tuple[str, ...]
    """What a reader of the figures must know, one sentence per entry."""
    versions: dict[str, str]
    """Package name -> version, of reallm, torch and transformers."""
    adapter: str | None = None
    """The adapter that the model was evaluated with; the sizes do not include it."""

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
    """Measure a model's perplexity and sizes, and its KL divergence from the original.

    Parameters
    ----------
    path
        An artifact, or any model: a folder, a .gguf file or a hub name.
    against
        The original model, for the KL divergence; None measures perplexity and sizes only.
    text
        What to evaluate on (see `reallm.text.corpus.load_text`); None for an English text that comes with Python.
    seqlen
        Context in tokens. Perplexities at different contexts cannot be compared.
    windows
        Maximum number of windows; None for the whole text.
    dtype
        What both models compute in: "float32", "bfloat16" or "float16".
    device
        Where both models run, such as "cpu" or "cuda:0".
    seed
        Chooses the masked tokens of an encoder.
    adapter
        A LoRA or DoRA adapter for an artifact, as in `load`.
    progress
        Whether to show progress.

    Returns
    -------
    Evaluation
        KL in nats per token; sizes in bytes and in bits per weight.

    Raises
    ------
    UserError
        For models that cannot be read, too little text, and logits that are not finite.

    Examples
    --------
    >>> result = reallm.evaluate("out", against="model", text="test.txt", seqlen=32, windows=4, progress=False)
    >>> result.comparison.perplexity > 1, result.sizes.matrices_bpw <= 5
    (True, True)
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
    mask = mask_token_of(opened.model, opened.tokenizer, str(path))
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


def _notes(text: Text, mask: int | None, adapter: str | Path | None) -> Iterator[str]:
    """What a reader of the figures must know."""
    if text.is_fallback:
        yield "this text comes with Python and is not a benchmark; give --text for figures that can be compared"
    if adapter is not None:
        yield f"evaluated with the adapter {adapter}; the sizes do not include it"
    if mask is not None:
        yield f"the model is an encoder: the perplexity is that of a random {MASK_SHARE:.0%} of the tokens, masked"
