"""The packed codes of the formats that a plan chose: read from the cache in the work folder, or encoded again.

`measure` and this module call the same encoder on one thread, so encoding again gives the same bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reallm.codecs.encode import encode
from reallm.codecs.metric import Workspace
from reallm.codecs.packed_fields import PackedFields
from reallm.errors import UserError
from reallm.kernels.codes.stored_fields import fields_sha256
from reallm.kernels.formats.codecs import DenseCodec
from reallm.kernels.formats.formats import Format
from reallm.models.loaded import LoadedModel
from reallm.planner.tables.measured_table import TABLE_FILE, MeasuredTable
from reallm.planner.tables.plan import Choice
from reallm.planner.tables.records import read_record
from reallm.planner.tables.tensor_layout import shared_key
from reallm.system.threads import one_thread

from .encoding import Job, codebook_values

LOG = logging.getLogger(__name__)


class MeasuredCodes:
    """The packed fields of a plan's choices, from the work folder `work`."""

    def __init__(self, work: Path, loaded: LoadedModel) -> None:
        """Open the cache in `work`. Raises UserError if `work` was measured on another model than `loaded`."""
        table = read_record(work / TABLE_FILE, MeasuredTable, "measure")
        if table.model_sha256 != loaded.digest:
            raise UserError(f"{work} was measured on another model than {loaded.source}; measure again, or give --work")
        self.job = Job.at(work, str(table.settings["identity"]), int(table.settings["seed"] or 0))
        self.loaded, self.digests = loaded, {record.key: record.sha256 for record in table.shared}
        self.matrices = {matrix.name: matrix for matrix in loaded.matrices}

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
            work = Workspace(self.job.metric(matrix))
            return encode(self.loaded.weight(matrix), fmt, work, shared=codebooks, seed=self.job.seed)

    def shared(self, key: str) -> NDArray[np.uint8]:
        """The bytes of the shared codebooks called `key`. Raises UserError if they are missing or changed."""
        fields = self.job.cache.fields(self.job.codebook_key(key))
        if fields is None or fields_sha256(fields) != self.digests.get(key):
            raise UserError(
                f"{self.job.cache.folder}: the shared codebooks {key} are missing or changed; measure again"
            )
        return fields["codebooks"]
