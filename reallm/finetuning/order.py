"""The stages of fine-tuning: which there are, in which order, and which are worth it where nobody says."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import psutil
import torch

from ..calibration import statistics_path
from ..encoding import Encoded
from ..errors import UserError
from ..planner.records import RecordError, canonical_json, write_text_atomic

if TYPE_CHECKING:
    from .pair import Pair, Training

LOG = logging.getLogger(__name__)
Stage = Literal["codes", "blocks", "end-to-end"]
ORDER_FILE = "order.json"
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


def kept_order(pair: Pair, work: Path | None, divergence: float, folder: Path) -> tuple[Stage, ...]:
    """`best_order`, decided once for the run in `folder`: an interrupted one goes on as it began. Raises UserError."""
    if work is None:
        return ("end-to-end",)
    path = folder / ORDER_FILE
    try:
        return check_order(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        order = best_order(pair, work, divergence)
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged; give --no-resume to start anew") from None
    write_text_atomic(path, canonical_json(list(order)))
    return order


def best_order(pair: Pair, work: Path, divergence: float) -> tuple[Stage, ...]:
    """The stages of a model so far from the original, nats per token: new codes first where they help and can be made.

    `work` is the measured folder.
    """
    if divergence < CODES_FROM:
        return ("end-to-end",)
    missing = _missing(pair, work)
    if missing is None:
        LOG.info("%.2f nats are lost: new codes come first; --order end-to-end leaves them out", divergence)
        return "codes", "end-to-end"
    LOG.warning("%.2f nats are lost, where new codes would help; they are left out: %s", divergence, missing)
    return ("end-to-end",)


def _missing(pair: Pair, work: Path) -> str | None:
    """What new codes lack; None for nothing."""
    original, device = pair.original, pair.model.device
    try:
        statistics = Encoded(work, original).job.statistics
    except (RecordError, UserError) as error:
        return f"{error}; or give --work"
    blocks = {matrix.block for matrix in original.matrices}
    if gone := [path for block in blocks if not (path := statistics_path(statistics, block)).exists()]:
        return f"{gone[0]} is gone; measure again"
    wanted = CODES_BYTES * pair.windows.original.weights
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
