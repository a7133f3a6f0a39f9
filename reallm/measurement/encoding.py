"""One matrix in one format: its metric, its packed fields, and where the cache keeps them.

Shared by `measure`, which encodes every candidate, and `compile`, which encodes the chosen ones again if the cache no
longer has their codes: the same function on one thread, so the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reallm.calibration.calibrate import BlockStatistics, read_statistics
from reallm.codecs.encode import CODEC_VERSION, encode
from reallm.codecs.metric import Metric, Workspace
from reallm.codecs.packed_fields import PackedFields, store
from reallm.errors import UserError
from reallm.kernels.formats.codecs import AdditiveCodec, NeuralCodec
from reallm.kernels.formats.formats import Format
from reallm.kernels.reference import read_field
from reallm.models.loaded import LoadedModel, Matrix
from reallm.planner.problem.tensor_layout import shared_key
from reallm.planner.tables.measured_table import TABLE_FILE, MeasuredTable
from reallm.planner.tables.plan import Choice
from reallm.planner.tables.records import read_record
from reallm.system.threads import one_thread

from .cache import Cache, content_key, fields_sha256


@dataclass(frozen=True)
class Job:
    """What encoding needs to know besides the matrix."""

    cache: Cache
    statistics: Path
    identity: str
    """Hash of the model, the text and the settings of calibration."""
    seed: int
    keep_codes: bool = True

    @staticmethod
    def at(output: Path, identity: str, seed: int, keep_codes: bool = True) -> Job:
        """The job of the measured folder `output`."""
        return Job(Cache(output / "cache"), output / "statistics" / identity[:16], identity, seed, keep_codes)

    def key(self, matrix: str, fmt: Format) -> str:
        """Cache key of one matrix in one format."""
        return content_key(
            {"identity": self.identity, "matrix": matrix, "format": fmt.name, "seed": self.seed, "codec": CODEC_VERSION}
        )

    def codebook_key(self, name: str) -> str:
        """Cache key of the codebooks called `name`."""
        return content_key({"identity": self.identity, "shared": name, "seed": self.seed, "codec": CODEC_VERSION})

    def metric(self, matrix: Matrix) -> Metric:
        """The metric of `matrix`, from its block's statistics."""
        return metric_of(matrix, read_statistics(self.statistics, matrix.block, [matrix]))


def metric_of(matrix: Matrix, statistics: BlockStatistics) -> Metric:
    """The metric of `matrix`; statistics that the calibration text never touched are zero."""
    lookup = statistics.lookups.get(matrix.name)
    fisher = statistics.fisher.get(matrix.name)
    if fisher is None:
        fisher = torch.zeros(matrix.rows, matrix.cols)
    hessian = statistics.guided.get(matrix.name)
    return Metric(
        hessian=torch.zeros(matrix.cols, matrix.cols) if hessian is None else hessian,
        fisher=fisher if lookup is None else fisher + lookup,
        row_weight=statistics.row_weights.get(matrix.name),
        extra_fisher=lookup,
        gram=statistics.grams.get(matrix.name),
    )


def codebook_values(fmt: Format, fields: PackedFields) -> Tensor:
    """What matrices of `fmt` share, float32, from its bytes: codebooks [M, 2^B, d], or the bytes of a decoder."""
    codec, field = fmt.codec, fmt.shared_field
    assert isinstance(codec, AdditiveCodec | NeuralCodec) and field is not None
    return torch.from_numpy(read_field(field, fields).reshape(codec.codebook_shape)).float()


def codebook_bytes(fmt: Format, books: Tensor | None) -> Tensor | None:
    """Shared codebooks as the bytes of their field, as `decode` takes them."""
    if books is None or fmt.shared_field is None:
        return None
    return torch.from_numpy(store(fmt.shared_field, books))


class Encoded:
    """The chosen codes of a plan: from the cache of a measured folder, or encoded again."""

    def __init__(self, work: Path, loaded: LoadedModel) -> None:
        table = read_record(work / TABLE_FILE, MeasuredTable, "measure")
        if table.model_sha256 != loaded.digest:
            raise UserError(f"{work} was measured on another model than {loaded.source}; measure again, or give --work")
        self.job = Job.at(work, str(table.settings["identity"]), int(table.settings["seed"] or 0))
        self.loaded, self.digests = loaded, {record.key: record.sha256 for record in table.shared}
        self.matrices = {matrix.name: matrix for matrix in loaded.matrices}

    def fields(self, choice: Choice) -> PackedFields:
        """Packed fields of one choice; the caller compares their digest with the plan's."""
        fmt, matrix = Format.parse(choice.format), self.matrices[choice.matrix]
        cached = self.job.cache.fields(self.job.key(matrix.name, fmt)) or {}
        names = [field.name for field in fmt.fields(matrix.rows, matrix.cols)]
        if set(names) <= set(cached):
            fields = {name: cached[name] for name in names}
            if fields_sha256(fields) == choice.codes_sha256:
                return fields
        key = shared_key(fmt, matrix.family)
        books = codebook_values(fmt, {"codebooks": self.shared(key)}) if key else None
        with one_thread():
            work = Workspace(self.job.metric(matrix))
            return encode(self.loaded.weight(matrix), fmt, work, shared=books, seed=self.job.seed)

    def shared(self, key: str) -> NDArray[np.uint8]:
        """The bytes of shared codebooks."""
        fields = self.job.cache.fields(self.job.codebook_key(key))
        if fields is None or fields_sha256(fields) != self.digests.get(key):
            raise UserError(f"{self.job.cache.folder}: the shared codebooks {key} are gone or changed; measure again")
        return fields["codebooks"]
