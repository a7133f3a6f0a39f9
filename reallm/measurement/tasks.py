"""The task of a worker: encode one matrix in several formats and measure the cost of each.

A worker may be this process, another process, or a process on another machine. It reads the weight, the statistics and
the cache in the work folder. It stores each result in the cache immediately, so that an interrupted run can be resumed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from reallm.codecs.encode import CODEC_VERSION, encode
from reallm.codecs.metric import Workspace
from reallm.decoding.decode import decode
from reallm.errors import UserError
from reallm.kernels.codes.stored_fields import fields_sha256
from reallm.kernels.formats.formats import Format
from reallm.models.matrix import Matrix
from reallm.planner.tables.measured_table import MeasurementRecord
from reallm.planner.tables.tensor_layout import shared_key
from reallm.system.memory import peak_rss_bytes
from reallm.system.threads import one_thread

from .encoding import Job, codebook_bytes
from .weight_files import read_weight


@dataclass(frozen=True)
class MatrixResult:
    """The result of one task."""

    records: list[MeasurementRecord]
    notes: list[str]
    """Notes for the user, one line each."""
    peak_rss_bytes: int
    """Peak memory of the worker's process so far."""


def measure_matrix(
    weight_path: Path,
    matrix: Matrix,
    formats: Sequence[Format],
    job: Job,
    codebooks: Mapping[str, Tensor],
    codec_version: int,
) -> MatrixResult:
    """Measure `matrix` in all `formats`, on one thread, so that the bytes do not depend on the number of workers.

    `weight_path` is a file written by `WorkerWeights.write_weight`, `codebooks` maps the keys of shared codebooks to
    their values, and `codec_version` is the CODEC_VERSION of the process that created the task. Raises UserError if the
    encoders of this worker have another version, or if this machine has no access to the weight file.
    """
    if codec_version != CODEC_VERSION:
        versions = f"{CODEC_VERSION}, not {codec_version}"
        raise UserError(f"a worker's reallm has encoders of version {versions}; install the same on every machine")
    with one_thread():
        W, records = read_weight(weight_path), []
        work = Workspace(job.metric(matrix))
        for fmt in formats:
            record = job.cache.measurement(job.key(matrix.name, fmt))  # by a worker that died, or another machine
            if record is None:
                codebook = codebooks.get(shared_key(fmt, matrix.family) or "")
                record = _measure_format(W, matrix, fmt, work, job, codebook)
            records.append(record)
    return MatrixResult(records, [f"{matrix.name}: {note}" for note in work.notes], peak_rss_bytes())


def _measure_format(
    W: Tensor, matrix: Matrix, fmt: Format, work: Workspace, job: Job, shared: Tensor | None
) -> MeasurementRecord:
    """Encode W in one format, decode the packed bytes, and store the costs of the error in the cache."""
    started = time.thread_time()
    fields = encode(W, fmt, work, shared=shared, seed=job.seed, device=job.device)
    seconds = time.thread_time() - started
    packed = {name: torch.from_numpy(value) for name, value in fields.items()}
    error = W - decode(fmt, packed, matrix.rows, matrix.cols, shared=codebook_bytes(fmt, shared))
    power = float(W.square().sum(dtype=torch.float64))
    record = MeasurementRecord(
        matrix=matrix.name,
        format=fmt.name,
        nbytes=sum(value.nbytes for value in fields.values()),
        guided=work.metric.guided(error),
        two_sided=work.two_sided(error),
        fisher=work.metric.diagonal(error),
        relative=float(error.square().sum(dtype=torch.float64)) / power if power > 0 else 0.0,
        seconds=round(seconds, 3),
        codes_sha256=fields_sha256(fields),
    )
    key = job.key(matrix.name, fmt)
    if job.keep_codes:
        job.cache.put_fields(key, fields)
    job.cache.put_measurement(key, record)
    return record
