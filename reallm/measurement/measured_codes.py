"""The packed codes of the formats that a plan chose: read from the cache in the work folder, or encoded again.

`measure` and this module call the same encoder on one thread, so encoding again gives the same bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from reallm.codecs.encode import encode
from reallm.codecs.metric import Workspace
from reallm.codecs.packed_fields import PackedFields
from reallm.errors import UserError
from reallm.kernels.codes.stored_fields import fields_sha256
from reallm.kernels.formats.codecs import DenseCodec
from reallm.kernels.formats.formats import Format
from reallm.models.loaded import LoadedModel
from reallm.planner.tables.plan import Choice, Plan
from reallm.planner.tables.tensor_layout import shared_key
from reallm.planner.tables.work_folder import described, folder_of, read_table
from reallm.system.device import CPU
from reallm.system.threads import one_thread

from .encoding import Job, codebook_values

LOG = logging.getLogger(__name__)


class MeasuredCodes:
    """The packed fields of a plan's choices, from a work folder."""

    def __init__(self, work: Path, loaded: LoadedModel, device: torch.device = CPU) -> None:
        """Open the cache of the work folder `work`, which may also be the file of one of its tables.

        What the cache lacks is encoded on `device`.

        Raises UserError if it was measured on another model than `loaded`.
        """
        table = read_table(work)
        if table.model_sha256 != loaded.digest:
            raise UserError(f"{work} was measured on another model than {loaded.source}; measure again, or give --work")
        self.work, self.table = work, table
        identity, seed = str(table.settings["identity"]), int(table.settings["seed"] or 0)
        self.job = Job.at(folder_of(work), identity, seed, device=device)
        self.loaded, self.digests = loaded, {record.key: record.sha256 for record in table.shared}
        self.matrices = {matrix.name: matrix for matrix in loaded.matrices}

    def check_measured(self, plan: Plan) -> None:
        """Raise UserError if the table has other codes than the plan for one of its choices."""
        measured = {(record.matrix, record.format): record.codes_sha256 for record in self.table.measurements}
        for choice in plan.choices:
            if measured.get((choice.matrix, choice.format), choice.codes_sha256) == choice.codes_sha256:
                continue
            if self.table.digest() == plan.table_sha256:
                raise UserError(
                    f"{choice.matrix} has other codes in the plan than were measured: it is the plan of a fine-tuned "
                    "artifact, whose codes are in its own folder only; compile the plan that it was made from"
                )
            raise UserError(
                f"the plan was not made from the measurements in {folder_of(self.work)} ({described(self.table)}): "
                f"these give {choice.matrix} other codes in {choice.format}; name the folder that it was made from "
                "with --work, or plan again"
            )

    def log_missing(self, choices: Sequence[Choice]) -> None:
        """Log how many of the choices must be encoded again because the cache does not hold their codes."""
        packed = [c for c in choices if not isinstance(Format.parse(c.format).codec, DenseCodec)]
        keys = [self.job.key(choice.matrix, Format.parse(choice.format)) for choice in packed]
        if missing := sum(not self.job.cache.has_fields(key) for key in keys):
            LOG.warning(
                "encoding %d of %d matrices again: %s does not hold their codes (measured without keeping codes, "
                "or its files were removed)",
                missing,
                len(packed),
                self.job.cache.folder,
            )

    def fields(self, choice: Choice) -> PackedFields:
        """The packed fields of one choice; the caller compares their digest with that in the plan."""
        fmt, matrix = Format.parse(choice.format), self.matrices[choice.matrix]
        cached = self.job.cache.fields(self.job.key(matrix.name, fmt)) or {}
        names = [field.name for field in fmt.fields(matrix.rows, matrix.cols)]
        if set(names) <= set(cached):
            fields = {name: cached[name] for name in names}
            if fields_sha256(fields) == choice.codes_sha256:
                return fields
        key = shared_key(fmt, matrix.family)
        codebooks = codebook_values(fmt, {"codebooks": self.shared(key)}) if key else None
        with one_thread():
            work, seed, device = Workspace(self.job.metric(matrix)), self.job.seed, self.job.device
            return encode(self.loaded.weight(matrix), fmt, work, shared=codebooks, seed=seed, device=device)

    def shared(self, key: str) -> NDArray[np.uint8]:
        """The bytes of the shared codebooks called `key`. Raises UserError if they are missing or changed."""
        fields = self.job.cache.fields(self.job.codebook_key(key))
        if fields is None or fields_sha256(fields) != self.digests.get(key):
            raise UserError(
                f"{self.job.cache.folder}: the shared codebooks {key} are missing or changed; measure again"
            )
        return fields["codebooks"]
