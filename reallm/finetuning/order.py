"""The stages of fine-tuning: which there are, in which order, and which a run takes that names none."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import psutil

from ..errors import UserError
from ..kernels.codecs import DenseCodec
from ..kernels.formats import Format
from ..planner.plan import Plan
from ..planner.records import TABLE_FILE, MeasuredTable, RecordError, read_record

if TYPE_CHECKING:
    from .pair import Training

LOG = logging.getLogger(__name__)
Stage = Literal["codes", "blocks", "end-to-end"]
RECODING_BYTES = 20
"""For each weight: the original, its copy, the gradient and the two moments of Adam, float32."""


def check_order(stages: Sequence[str]) -> tuple[Stage, ...]:
    """`stages`, each known and there once. Raises UserError."""
    found = tuple(stage for name in stages for stage in get_args(Stage) if stage == name)
    named = ",".join(stages)
    if not found or len(found) < len(stages) or len(set(found)) < len(found):
        raise UserError(f"--order {named}: expected one or more of {', '.join(get_args(Stage))}, each once")
    if "codes" in found[1:]:
        raise UserError(f"--order {named}: new codes undo what was trained before; codes come first")
    return found


def read_table(measured: Path) -> MeasuredTable:
    """The table of a measured folder. Raises RecordError."""
    return read_record(measured / TABLE_FILE, MeasuredTable, "measure")


def choose_order(plan: Plan, measured: Path, frozen: bool) -> tuple[Stage, ...]:
    """New codes first for an artifact as it was planned from the folder `measured`, unless codes are to be `frozen`."""
    if frozen:
        return ("end-to-end",)
    needed, there = RECODING_BYTES * sum(c.rows * c.cols for c in plan.choices), psutil.virtual_memory().total
    try:
        known = {(r.matrix, r.format): r.codes_sha256 for r in read_table(measured).measurements}
    except RecordError as error:
        why = str(error)
    else:
        coded = [c for c in plan.choices if not isinstance(Format.parse(c.format).codec, DenseCodec)]
        if needed > there:
            why = f"new ones take about {needed >> 20} MiB of memory, this machine has {there >> 20}"
        elif any(known.get((c.matrix, c.format)) != c.codes_sha256 for c in coded):
            why = f"they are not those of {measured}, so they were trained, and new ones would undo that"
        else:
            return ("codes", "end-to-end")
    LOG.info("the codes stay as they are: %s", why)
    return ("end-to-end",)


def in_words(training: Training, steps: int) -> str:
    """The stages of a run that made `steps` from end to end, the first one first."""
    words: dict[Stage, str] = {
        "end-to-end": f"for {steps} steps of {training.batch_size} x {training.seqlen} tokens",
        "codes": f"by new codes, {training.code_steps} steps after each block",
        "blocks": f"block by block for {training.block_epochs} x {training.block_windows} windows each",
    }
    return ", then ".join(words[stage] for stage in training.order)
