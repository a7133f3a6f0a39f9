"""What encoding a matrix requires: its metric, its shared codebooks, and the keys of results in the cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from reallm.calibration.statistics import BlockStatistics, read_statistics
from reallm.codecs.encode import CODEC_VERSION
from reallm.codecs.metric import Metric
from reallm.codecs.packed_fields import PackedFields, store
from reallm.kernels.codes.stored_fields import read_field
from reallm.kernels.formats.codecs import AdditiveCodec, NeuralCodec
from reallm.kernels.formats.formats import Format
from reallm.models.matrix import Matrix
from reallm.system.device import CPU

from .cache import Cache, content_key


@dataclass(frozen=True)
class Job:
    """The folders and settings of one run of `measure`, the same for all matrices."""

    cache: Cache
    statistics: Path
    """The folder of the calibration statistics."""
    identity: str
    """Hash of the model, the text and the calibration settings."""
    seed: int
    keep_codes: bool = True
    """Whether packed fields are stored in the cache beside the measurements."""
    device: torch.device = CPU
    """Where encoders do their work."""

    @staticmethod
    def at(output: Path, identity: str, seed: int, keep_codes: bool = True, device: torch.device = CPU) -> Job:
        """The job whose files are in the work folder `output`."""
        return Job(Cache(output / "cache"), output / "statistics" / identity[:16], identity, seed, keep_codes, device)

    def key(self, matrix: str, fmt: Format) -> str:
        """The cache key of the matrix called `matrix` in one format."""
        return content_key(
            {"identity": self.identity, "matrix": matrix, "format": fmt.name, "seed": self.seed, "codec": CODEC_VERSION}
        )

    def codebook_key(self, name: str) -> str:
        """The cache key of the shared codebooks called `name` (see `planner.tables.tensor_layout.shared_key`)."""
        return content_key({"identity": self.identity, "shared": name, "seed": self.seed, "codec": CODEC_VERSION})

    def metric(self, matrix: Matrix) -> Metric:
        """Read the metric of `matrix` from the statistics of its block."""
        return matrix_metric(matrix, read_statistics(self.statistics, matrix.block, [matrix]))


def matrix_metric(matrix: Matrix, statistics: BlockStatistics) -> Metric:
    """The metric of `matrix`; H and the Fisher information are zero if no token of the calibration text reached it."""
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
    """Read the packed field that the matrices of a family share in format `fmt`, as float32.

    It holds additive codebooks [M, 2^B, d], or the bytes of a neural decoder [bytes].
    """
    codec, field = fmt.codec, fmt.shared_field
    assert isinstance(codec, AdditiveCodec | NeuralCodec) and field is not None
    return torch.from_numpy(read_field(field, fields).reshape(codec.codebook_shape)).float()


def codebook_bytes(fmt: Format, codebooks: Tensor | None) -> Tensor | None:
    """Pack shared codebooks into the bytes that `decode` takes, uint8 [bytes]; None if `codebooks` is None."""
    if codebooks is None or fmt.shared_field is None:
        return None
    return torch.from_numpy(store(fmt.shared_field, codebooks))
