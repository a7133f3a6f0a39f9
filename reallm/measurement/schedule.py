"""Scheduling: read the measurements that the cache already holds, and let workers make the others.

There is one task per matrix, so that the factorisations of the matrix's metric are computed once for all formats.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from reallm.codecs.encode import CODEC_VERSION
from reallm.kernels.formats.formats import Format
from reallm.models.loaded import LoadedModel
from reallm.models.matrix import Matrix
from reallm.planner.tables.measured_table import MeasurementRecord
from reallm.planner.tables.tensor_layout import shared_key
from reallm.system.progress import progress_bar

from .encoding import Job
from .tasks import MatrixResult, measure_matrix
from .weight_files import worker_weights_dir
from .workers.pool import run_all
from .workers.task import Task, Workers

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """Measurements of several matrices."""

    records: list[MeasurementRecord]
    worker_peak_bytes: int
    """The largest peak memory of a worker process, in bytes; 0 if the cache held all measurements."""


def measure_formats(
    loaded: LoadedModel,
    formats: Mapping[str, Sequence[Format]],
    job: Job,
    codebooks: Mapping[str, Tensor],
    workers: Workers,
) -> Measured:
    """Measure the matrices in their `formats` (by matrix name), on `workers` unless the cache holds the measurement.

    `codebooks` maps the keys of shared codebooks to their values. Notes of the workers are logged as warnings.
    """
    records, missing = split_by_cache(loaded, formats, job)
    numel = {matrix.name: matrix.numel for matrix, _ in missing}
    total = sum(numel[matrix.name] * len(absent) for matrix, absent in missing)
    worker_peak = 0
    with (
        progress_bar(
            total=total, desc="encode candidates", unit=" weights", unit_scale=True, disable=not missing, smoothing=0.05
        ) as bar,
        worker_weights_dir(job.cache.folder.parent) as weights,
    ):

        def tasks() -> Iterator[Task[MatrixResult]]:
            for matrix, absent in missing:
                needed = {key: codebooks[key] for fmt in absent if (key := shared_key(fmt, matrix.family)) is not None}
                path = weights.write_weight(loaded, matrix)
                call = partial(measure_matrix, path, matrix, absent, job, needed, CODEC_VERSION)
                yield Task(matrix.name, call)

        for result in run_all(workers, tasks()):
            for note in result.notes:
                LOG.warning("%s", note)
            records += result.records
            bar.update(sum(numel[record.matrix] for record in result.records))
            worker_peak = max(worker_peak, result.peak_rss_bytes)
            weights.remove_weight(result.records[0].matrix)
    return Measured(records, worker_peak)


def split_by_cache(
    loaded: LoadedModel, formats: Mapping[str, Sequence[Format]], job: Job
) -> tuple[list[MeasurementRecord], list[tuple[Matrix, list[Format]]]]:
    """(records in the cache, (matrix, formats that it lacks) of the other matrices), the largest matrix first."""
    known, missing = [], []
    for matrix in sorted(loaded.matrices, key=lambda m: -m.numel):
        absent = []
        for fmt in formats.get(matrix.name, ()):
            record = job.cache.measurement(job.key(matrix.name, fmt))
            if record is None:
                absent.append(fmt)
            else:
                known.append(record)
        if absent:
            missing.append((matrix, absent))
    return known, missing
