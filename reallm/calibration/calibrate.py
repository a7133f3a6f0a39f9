"""Calibration: one pass over the blocks of the model that gathers the statistics of every matrix.

The forward pass runs once and stores what each block returns on disk. Then, from the last block to the first, one block
at a time is run again with gradients, so only one block's statistics are in memory at any time. A model whose blocks
cannot be run alone is run as a whole (`gathering`). Labels are sampled from the model. Let x_t be the input of a matrix
at token t, and g_t the gradient of the summed loss at the matrix's output; for an encoder the loss is that of the
masked tokens. The sums run over the n tokens of the text:

    H_guided  = 1/n sum mean_i(g_ti^2) x_t x_t^T         per matrix (GuidedQuant, arXiv 2505.07004)
    F_ij      = 1/n sum g_ti^2 x_tj^2                    per matrix, the diagonal Fisher (LQ-LoRA, arXiv 2311.12023)
    G         = 1/n sum mean_j(x_tj^2) g_t g_t^T         per linear layer: H_guided x G is a Kronecker factorisation of
                                                         the Fisher information (as in K-FAC, arXiv 1503.05671)

An output head also has a weight per row: mean_t(g_ti^2) divided by its mean over rows. An embedding has the diagonal
Fisher information of its look-ups. Statistics are stored in one file per block; an interrupted pass resumes at the
block it had reached.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from reallm.kernels.storage.atomic import canonical_json, write_text_atomic
from reallm.models.conversion import computing_in, tensors_of, tensors_outside
from reallm.models.image_texts import ImageTexts
from reallm.models.loaded import LoadedModel
from reallm.models.probe import eager_experts
from reallm.system.device import CPU, is_gpu, placed
from reallm.system.lock import exclusive_lock

from .block_streaming import BlockStreamer
from .compute_dtype import compute_dtype
from .gathering import gather_at_once, gather_by_calls
from .needs import check_needs
from .objective import ImageObjective, Objective, make_objective
from .statistics import merge_statistics
from .unmeasured import complete_statistics

LOG = logging.getLogger(__name__)
DONE_FILE = "calibration.json"
PARTIAL_FOLDER = "partial"


@dataclass
class CalibrationReport:
    """The results of a calibration other than the statistics."""

    tokens: int
    """Number of tokens of the text, n in the formulas."""
    perplexity: float
    """Perplexity of the model on the text."""
    seconds: float
    """Wall-clock time of the run that finished the calibration."""
    notes: list[str] = field(default_factory=list)
    """Notes for the user, one line each."""
    kept: dict[str, str] = field(default_factory=dict)
    """Matrix without statistics, which therefore keeps its dtype -> the reason."""


def calibrate(
    loaded: LoadedModel,
    windows: Tensor,
    folder: Path,
    *,
    seed: int = 0,
    weights: AbstractContextManager[object] | None = None,
    images: ImageTexts | None = None,
    device: torch.device = CPU,
) -> CalibrationReport:
    """Gather the statistics of every matrix of `loaded` on `windows` (int64 [n, seqlen]) and write them to `folder`.

    An interrupted calibration is resumed. `weights` is a context in which the model has other weights, so that the
    statistics are gathered on the inputs that these weights produce; None uses the model's own weights. The context is
    not entered if `folder` already has the statistics. The caller chooses one folder per combination of model, text and
    settings; a second process that uses the folder waits for the first. `images` are texts with images that the model
    is run on too; the statistics are those of all tokens together. The model is moved to `device`: as a whole, or
    block by block if it does not fit into memory. Raises UserError for activations or gradients that are not finite.
    """
    with exclusive_lock(folder):
        done = folder / DONE_FILE
        if not done.exists():
            if loaded.scratch is not None and not is_gpu(device):
                LOG.warning("%s", check_needs(loaded, len(windows), windows.shape[1], folder))
            with ExitStack() as stack:
                if weights is not None:
                    stack.enter_context(weights)
                stack.enter_context(eager_experts(loaded.model))
                stack.enter_context(frozen(loaded.model))
                stack.enter_context(_converted(loaded, device))
                report = _gather_all(loaded, windows, folder, seed, images)
            write_text_atomic(done, canonical_json(vars(report)))
        shutil.rmtree(folder / PARTIAL_FOLDER, ignore_errors=True)
        return CalibrationReport(**json.loads(done.read_text(encoding="utf-8")))


@contextmanager
def _converted(loaded: LoadedModel, device: torch.device = CPU) -> Iterator[None]:
    """Put the model on `device` in the dtype to calibrate in; of a large one only what is outside its blocks."""
    large = loaded.scratch is not None
    tensors = tensors_outside(loaded.model, loaded.blocks) if large else tensors_of(loaded.model)
    scratch = None if is_gpu(device) else loaded.scratch
    with placed(tensors, device), computing_in(tensors, compute_dtype(loaded, device), scratch):
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Exclude all parameters of `model` from gradients within the context."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def _gather_all(
    loaded: LoadedModel, windows: Tensor, folder: Path, seed: int, images: ImageTexts | None
) -> CalibrationReport:
    """Run the calibration on text and, if there are any, on texts with images; each resumes by itself."""
    began = time.monotonic()
    objective = make_objective(loaded, windows, seed)
    if images is None:
        perplexity, notes = _gather(loaded, objective, folder, folder / PARTIAL_FOLDER)
    else:
        with_images = ImageObjective(loaded, images.inputs, images.placeholders, seed)
        text_folder, image_folder = folder / PARTIAL_FOLDER / "text", folder / PARTIAL_FOLDER / "images"
        perplexity, notes = _gather(loaded, objective, text_folder, text_folder / PARTIAL_FOLDER)
        _, more = _gather(loaded, with_images, image_folder, image_folder / PARTIAL_FOLDER)
        notes += [note for note in more if note not in notes]
        parts = {text_folder: objective.token_count, image_folder: with_images.token_count}
        merge_statistics(folder, parts, {m.block for m in loaded.matrices})
    unmeasured = complete_statistics(loaded, folder)
    seconds = time.monotonic() - began
    return CalibrationReport(objective.token_count, perplexity, seconds, notes + unmeasured.notes, unmeasured.kept)


def _gather(loaded: LoadedModel, objective: Objective, folder: Path, partial: Path) -> tuple[float, list[str]]:
    """Run one pass; each step writes its file when it is done, and is skipped if that file exists.

    Returns the model's perplexity and notes for the user.
    """
    streamer = BlockStreamer(loaded, partial, objective)
    streamer.store_results()
    perplexity = gather_by_calls(streamer, folder) if streamer.calls else gather_at_once(streamer, folder)
    return perplexity, streamer.notes
