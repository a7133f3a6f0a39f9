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
from reallm.models.limits import max_positions, vocabulary_size
from reallm.models.sentence_encoder import gives_embeddings
from reallm.models.sizes import Sizes
from reallm.runtime.open_model import RunnableModel, open_model
from reallm.system.memory import peak_rss_bytes
from reallm.text.corpus import Text, load_text
from reallm.text.masking import MASK_SHARE
from reallm.text.windows import cut_windows, shortage

from .compare import Comparison
from .opened import check_same_kind, compare_opened

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

    An encoder is measured on masked tokens, and by the cosine between its embeddings and the original's. A model that
    also takes images or sound is measured on text alone.

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
        For models that cannot be read or do not belong together, too little text, a window longer than a model's
        positions, token ids that a model does not have, and logits that are not finite.

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
    check_same_kind(opened, base, path, against)
    models = [each.model for each in (opened, base) if each is not None]
    tokens = cut_windows(
        source,
        opened.tokenizer,
        None,
        seqlen,
        max_positions=min((limit for each in models if (limit := max_positions(each))), default=None),
        vocabulary=min((rows for each in models if (rows := vocabulary_size(each))), default=None),
    )
    tokens = tokens[:windows]
    comparison = compare_opened(opened, base, path, tokens, seed, progress)
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
        notes=tuple(_notes(source, opened, adapter, shortage(tokens, windows))),
        versions={name: version(name) for name in ("reallm", "torch", "transformers")},
        adapter=None if adapter is None else str(adapter),
    )


def _notes(text: Text, opened: RunnableModel, adapter: str | Path | None, too_few_windows: str | None) -> Iterator[str]:
    """What a reader of the figures must know."""
    model = opened.model
    if too_few_windows is not None:
        yield too_few_windows
    if text.is_fallback:
        yield "this text comes with Python and is not a benchmark; give --text for figures that can be compared"
    if adapter is not None:
        yield f"evaluated with the adapter {adapter}; the sizes do not include it"
    if gives_embeddings(model):
        yield "the model has no output layer for tokens: only the cosine of its embeddings to those of --against counts"
    elif not model.can_generate():
        yield f"the model is an encoder: the perplexity is that of a random {MASK_SHARE:.0%} of the tokens, masked"
    if model.config.get_text_config() is not model.config:
        yield "the model also takes other inputs than text, such as images: it is evaluated on text alone"
