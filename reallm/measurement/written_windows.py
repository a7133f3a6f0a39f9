"""Windows of calibration text that the model writes itself, kept in the work folder.

A resumed run has the same windows: their file is rewritten after every batch, and a run that was interrupted continues
behind it.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from reallm.calibration.compute_dtype import whole_model_dtype
from reallm.kernels.codes.stored_fields import fields_sha256
from reallm.models.conversion import computing_in, tensors_of
from reallm.models.kv_cache import kv_cache
from reallm.models.loaded import LoadedModel
from reallm.system.memory import available_memory
from reallm.system.progress import progress_bar
from reallm.system.tensor_file import save_tensors
from reallm.text.corpus import Text
from reallm.text.model_written import Start, text_start, write_windows

from .cache import content_key

LOG = logging.getLogger(__name__)
TEXT_FOLDER = "text"
"""Name of the folder, inside a work folder, of calibration windows that are kept."""
WRITING_VERSION = 1
"""Part of the name of such a file: raise it whenever other windows would be written."""
MAX_BATCH = 64
"""Windows that are written at the same time."""
CACHE_SHARE = 0.1
"""Largest share of the free memory that the KV cache of these windows may take."""


def obstacle_to_writing(loaded: LoadedModel) -> str | None:
    """The reason why `loaded` cannot write a text; None if it can."""
    name = type(loaded.model).__name__
    if loaded.tokenizer is None:
        return f"{loaded.source} has no tokenizer, which says how its texts begin"
    if not loaded.model.can_generate():
        return f"{loaded.source} is {name}, which does not generate text"
    if loaded.model.config.is_encoder_decoder:
        return f"{loaded.source} is {name}, which answers a text that its encoder reads"
    if loaded.scratch is not None:
        return f"{loaded.source} does not fit into memory, and would be read once for every token"
    if text_start(loaded.model, loaded.tokenizer) is None:
        return f"{loaded.source} has no BOS and no EOS token, so how its texts begin is unknown"
    return None


def written_windows(loaded: LoadedModel, work: Path, nsamples: int, seqlen: int, seed: int) -> Tensor:
    """The windows 0 to `nsamples` that the model writes, int64 [nsamples, seqlen]: those kept in `work`, and new ones.

    The model must be able to write (`obstacle_to_writing`). Raises UserError as `write_windows` does.
    """
    assert loaded.tokenizer is not None
    start = text_start(loaded.model, loaded.tokenizer)
    assert start is not None
    parts = {"model": loaded.digest, "seqlen": seqlen, "seed": seed, "start": start.tokens, "ends": sorted(start.ends)}
    path = work / TEXT_FOLDER / f"{content_key({**parts, 'version': WRITING_VERSION})[:16]}.safetensors"
    done = _kept_windows(path, seqlen)
    if len(done) < nsamples:
        done = _write(loaded, start, done, path, nsamples, seqlen, seed)
    return done[:nsamples]


def written_text(ids: Tensor) -> Text:
    """What to call the windows `ids`, int64 [n, seqlen], that a model wrote."""
    return Text(
        documents=(),
        description="text written by the model itself at temperature 1",
        sha256=fields_sha256({"ids": ids.numpy().astype("<i8").reshape(-1).view(np.uint8)}),
    )


def _write(
    loaded: LoadedModel, start: Start, done: Tensor, path: Path, nsamples: int, seqlen: int, seed: int
) -> Tensor:
    """Write the windows that `done` [n, seqlen] lacks, and keep all in `path` after every batch."""
    tokens = nsamples * seqlen
    LOG.info(
        "the model writes its calibration text: %d windows of %d tokens, each text begins with %s (%s)",
        nsamples,
        seqlen,
        list(start.tokens),
        start.origin,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    batch = batch_size(loaded, seqlen)
    began = time.monotonic()
    with (
        computing_in(tensors_of(loaded.model), whole_model_dtype(loaded)),
        progress_bar(total=tokens, initial=done.numel(), desc="write text", unit="token") as bar,
    ):
        while len(done) < nsamples:
            indices = range(len(done), min(len(done) + batch, nsamples))
            new = write_windows(loaded.model, start, indices, seqlen, seed=seed, bar=bar)
            done = torch.cat([done, new])
            save_tensors(path, {"ids": done})
    LOG.info("wrote %d tokens in %.0f s", tokens, time.monotonic() - began)
    return done


def batch_size(loaded: LoadedModel, seqlen: int) -> int:
    """How many windows are written at the same time: MAX_BATCH, or as many as have room for their KV cache."""
    values = sum(layer.values for layer in kv_cache(loaded.model))
    nbytes = max(1, values * seqlen * whole_model_dtype(loaded).itemsize)
    return max(1, min(MAX_BATCH, int(CACHE_SHARE * available_memory()) // nbytes))


def _kept_windows(path: Path, seqlen: int) -> Tensor:
    """The windows in `path`, int64 [n, seqlen]; none if it is missing or damaged."""
    none = torch.empty(0, seqlen, dtype=torch.int64)
    try:
        ids = load_file(path).get("ids", none)
    except (FileNotFoundError, SafetensorError):
        return none
    return ids if ids.ndim == 2 and ids.shape[1] == seqlen and ids.dtype == torch.int64 else none
