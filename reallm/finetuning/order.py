"""The stages of fine-tuning: which there are, in which order, and which are worth it where nobody says."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import psutil
import torch

from ..errors import UserError
from ..planner.records import TABLE_FILE, MeasuredTable, RecordError, read_record

if TYPE_CHECKING:
    from .pair import Pair, Training

LOG = logging.getLogger(__name__)
Stage = Literal["codes", "blocks", "end-to-end"]
CODES_FROM = 0.4
"""Nats of divergence from which new codes are worth their time: at .6 they bring much, at .15 nothing (docs/log.md)."""
CODES_BYTES = 24
"""Memory that new codes take for each weight of the model, with some to spare."""


def check_order(stages: Sequence[str]) -> tuple[Stage, ...]:
    """`stages`, each known and there once. Raises UserError."""
    found = tuple(stage for name in stages for stage in get_args(Stage) if stage == name)
    named = ",".join(stages)
    if not found or len(found) < len(stages) or len(set(found)) < len(found):
        raise UserError(f"--order {named}: expected one or more of {', '.join(get_args(Stage))}, each once")
    if "codes" in found[1:]:
        raise UserError(f"--order {named}: new codes undo what was trained before; codes come first")
    return found


def best_order(pair: Pair, work: Path | None, divergence: float) -> tuple[Stage, ...]:
    """The stages of a model so far from the original, nats per token: new codes first where they help and can be made.

    `work` is the measured folder; None where new codes are out of the question.
    """
    if work is None or divergence < CODES_FROM:
        return ("end-to-end",)
    weights = sum(tensor.numel() for tensor in pair.original.model.parameters())
    missing = _missing(work, weights * CODES_BYTES, pair.model.device)
    if missing is None:
        return "codes", "end-to-end"
    LOG.warning("new codes would help, as the model has lost %.2f nats; left out: %s", divergence, missing)
    return ("end-to-end",)


def _missing(work: Path, wanted: int, device: torch.device) -> str | None:
    """What new codes lack that need so many bytes of memory; None for nothing."""
    try:
        read_record(work / TABLE_FILE, MeasuredTable, "measure")
    except RecordError as error:
        return f"{error}; or give --work"
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return None if wanted <= free else f"they take {wanted / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free"


def in_words(training: Training, order: Sequence[Stage], steps: int) -> str:
    """The stages `order` of a run that made `steps` from end to end, the first one first."""
    words: dict[Stage, str] = {
        "end-to-end": f"for {steps} steps of {training.batch_size} x {training.seqlen} tokens",
        "codes": f"by new codes, {training.code_steps} steps after each block",
        "blocks": f"block by block for {training.block_epochs} x {training.block_windows} windows each",
    }
    return ", then ".join(words[stage] for stage in order)
