"""The stage "codes": re-encode the blocks in order, and train the later, not yet encoded weights to compensate.

    for b = 0, 1, ...: encode block b from its current weights and fix it at the decoded values; then train the weights
    of the blocks after b, and all norms after b, on KL(p_teacher || p_model)

Incremental network quantisation (arXiv 1702.03044) and the block-wise recipes of QuIP# and QTIP (arXiv 2402.04396,
2406.11235) do the same; here the loss is that of the whole model. The formats, and therefore the size, do not change.
A matrix is encoded with the error metric it was measured with, so the work folder must exist. Weights are trained in
float32 by Adam with a cosine schedule, which takes 16 bytes per weight of the model, in addition to the teacher.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from reallm.system.progress import progress_bar

from .block_encoder import BlockEncoder
from .norms import norms_of
from .partly_encoded import PartlyEncodedModel
from .resolved_settings import ResolvedSettings
from .student_teacher import StudentTeacher

LOG = logging.getLogger(__name__)
STATE_FILE = "codes.safetensors"
SAVES = 5
"""Approximate number of times that a run saves its state."""


def recode(pair: StudentTeacher, measured: Path, settings: ResolvedSettings, folder: Path, before: float) -> float:
    """Give the blocks of the student new codes and norms; return the loss on the held-out windows.

    The old codes and norms stay unless the new loss is lower than `before`. `measured` is the file of the plan's
    table. Continues from the last state that an interrupted run saved in `folder`. Raises UserError if the table
    belongs to another model, or if the loss is not finite.
    """
    encoder = BlockEncoder(pair, measured)
    fields = {
        name: {field: raw.clone() for field, raw in packed.fields.items()} for name, packed in encoder.packed.items()
    }
    norms = {name: norm.get_parameter("weight").clone() for name, norm in norms_of(pair.student).items()}
    _encode_and_train(PartlyEncodedModel(pair, encoder, settings), folder / STATE_FILE)
    after = pair.held_out_loss()
    LOG.info("held-out loss: %.4f nats per token before, %.4f with new codes", before, after)
    if after < before:
        return after
    LOG.warning("new codes did not help: the old ones stay")
    for name, stored in fields.items():
        encoder.write(name, stored)
    with torch.no_grad():
        for name, value in norms.items():
            pair.student.get_submodule(name).get_parameter("weight").copy_(value)
    return before


def _encode_and_train(model: PartlyEncodedModel, path: Path) -> None:
    """Encode each block and train the blocks after it, resuming from the state saved at `path`; then store the
    norms.
    """
    blocks, steps = model.encoder.blocks, model.settings.code_steps
    done, count = model.load_state(path), len(blocks)
    every = max(1, count // SAVES)
    quiet = not LOG.isEnabledFor(logging.INFO)
    with progress_bar(total=count, initial=done, desc="codes", unit="block", disable=quiet) as bar:
        for index in range(done, count):
            model.encode_and_freeze(blocks[index])
            if index + 1 < count and steps:
                model.train(index)
            if (index + 1) % every == 0 or index + 1 == count:
                model.save_state(path, index + 1)
            bar.update()
    model.store_norms()
