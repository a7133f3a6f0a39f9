"""Measuring: every matrix is encoded in every candidate format and its actual error weighted.

One task a matrix, so that the factorisations of its metric are made once for all formats; tasks run in parallel, each
on one thread, which also makes their bytes independent of the number of workers. Every result goes to a content-
addressed cache at once: an interrupted run goes on where it stopped. Workers find weights, statistics and cache in the
measured folder, so they may be other machines that share it (`backends`, `handover`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from reallm.calibration.calibrate import calibrate, compute_dtype
from reallm.calibration.compressed_prefix import prefix_digest
from reallm.codecs.additive.shared_codebooks import fit_shared_codebooks
from reallm.codecs.encode import CODEC_VERSION, encode
from reallm.codecs.metric import Workspace
from reallm.decoding.decode import decode
from reallm.errors import UserError
from reallm.kernels.formats.formats import Format
from reallm.models.kv_cache import experts_per_token, kv_cache
from reallm.models.loaded import LoadedModel, Matrix, check_storable, load_model
from reallm.planner.problem.tensor_layout import shared_key
from reallm.planner.tables.measured_table import TABLE_FILE, MeasuredTable, MeasurementRecord, SharedRecord
from reallm.planner.tables.records import RecordError, read_record, write_record
from reallm.system.lock import exclusive_lock
from reallm.system.memory import peak_rss_bytes
from reallm.system.threads import one_thread
from reallm.text.corpus import Text, load_text, shortage, windows

from .cache import content_key, fields_sha256
from .encoding import Job, codebook_bytes, codebook_values
from .screening import Anchored, anchor_of, worth_measuring
from .search_space import Space, load_space
from .weight_files import take, worker_weights_dir
from .workers.pool import Backend, open_workers, run_all
from .workers.task import Task, Workers

LOG = logging.getLogger(__name__)
STATISTICS_VERSION = 2  # part of every key: raise it whenever the statistics may change
_Measured = tuple[list[MeasurementRecord], list[str], int]
DTYPE_NAMES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}


def _measure_one(
    W: Tensor, matrix: Matrix, fmt: Format, work: Workspace, job: Job, shared: Tensor | None
) -> MeasurementRecord:
    began = time.thread_time()
    fields = encode(W, fmt, work, shared=shared, seed=job.seed)
    seconds = time.thread_time() - began
    stored = {name: torch.from_numpy(value) for name, value in fields.items()}
    error = W - decode(fmt, stored, matrix.rows, matrix.cols, shared=codebook_bytes(fmt, shared))
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


def _measure_matrix(
    weight: Path, matrix: Matrix, formats: Sequence[Format], job: Job, books: dict[str, Tensor], codec: int
) -> _Measured:
    """One task: all formats of one matrix that the cache lacks, on one thread; also on another machine.

    `weight` is a file of `handover`, `codec` the CODEC_VERSION of who asks. Returns the records, notes for the user,
    and the peak memory of this process so far in bytes.
    """
    if codec != CODEC_VERSION:
        versions = f"{CODEC_VERSION}, not {codec}"
        raise UserError(f"a worker's reallm has encoders of version {versions}; install the same on every machine")
    with one_thread():
        W, records = take(weight), []
        work = Workspace(job.metric(matrix))
        for fmt in formats:
            done = job.cache.measurement(job.key(matrix.name, fmt))  # by a worker that died, or by another machine
            shared = books.get(shared_key(fmt, matrix.family) or "")
            records.append(_measure_one(W, matrix, fmt, work, job, shared) if done is None else done)
    return records, [f"{matrix.name}: {note}" for note in work.notes], peak_rss_bytes()


def _tasks(
    loaded: LoadedModel, wanted: Mapping[str, Sequence[Format]], job: Job
) -> tuple[list[MeasurementRecord], list[tuple[Matrix, list[Format]]]]:
    """(what the cache has, what is missing), the largest matrices first."""
    known, missing = [], []
    for matrix in sorted(loaded.matrices, key=lambda m: -m.numel):
        absent = []
        for fmt in wanted[matrix.name]:
            record = job.cache.measurement(job.key(matrix.name, fmt))
            if record is None:
                absent.append(fmt)
            else:
                known.append(record)
        if absent:
            missing.append((matrix, absent))
    return known, missing


def _codebooks(loaded: LoadedModel, space: Space, job: Job) -> tuple[dict[str, Tensor], list[SharedRecord]]:
    """Codebooks of every shared format and family, from the cache or fitted now."""
    books, records = {}, []
    wanted = {
        key: fmt
        for matrix in loaded.matrices
        for fmt in space.formats[matrix.kind]
        if (key := shared_key(fmt, matrix.family)) is not None
    }
    for key, fmt in tqdm(sorted(wanted.items()), desc="shared codebooks", disable=not wanted):
        fields = job.cache.fields(job.codebook_key(key))
        if fields is None:
            members = [m for m in loaded.matrices if shared_key(fmt, m.family) == key]
            with one_thread():
                fields = fit_shared_codebooks(fmt, ((loaded.weight(m), job.metric(m)) for m in members), job.seed)
            job.cache.put_fields(job.codebook_key(key), fields)
        books[key] = codebook_values(fmt, fields)
        nbytes = sum(value.nbytes for value in fields.values())
        records.append(SharedRecord(key=key, nbytes=nbytes, sha256=fields_sha256(fields)))
    return books, records


def _run(
    loaded: LoadedModel,
    missing: list[tuple[Matrix, list[Format]]],
    job: Job,
    books: dict[str, Tensor],
    workers: Workers,
) -> tuple[list[MeasurementRecord], int]:
    """Encode what is missing: the records, and the peak memory of the largest process that did, in bytes."""
    found: list[MeasurementRecord] = []
    largest = 0
    sizes = {m.name: m.numel for m, _ in missing}
    total = sum(sizes[m.name] * len(formats) for m, formats in missing)
    with (
        tqdm(total=total, desc="measure", unit="w", unit_scale=True, disable=not missing, smoothing=0.05) as bar,
        worker_weights_dir(job.cache.folder.parent) as handover,
    ):

        def tasks() -> Iterator[Task[_Measured]]:
            for m, formats in missing:
                own = {key: books[key] for fmt in formats if (key := shared_key(fmt, m.family)) is not None}
                weight = handover.put(loaded, m)
                yield Task(m.name, partial(_measure_matrix, weight, m, formats, job, own, CODEC_VERSION))

        for records, notes, peak in run_all(workers, tasks()):
            for note in notes:
                LOG.warning("%s", note)
            found += records
            bar.update(sum(sizes[record.matrix] for record in records))
            largest = max(largest, peak)
            handover.drop(records[0].matrix)
    return found, largest


def _bounded(
    loaded: LoadedModel, space: Space, job: Job, books: dict[str, Tensor], workers: Workers, bpw: tuple[float, float]
) -> tuple[dict[str, tuple[Format, ...]], int]:
    """(formats worth measuring by matrix name, peak memory) after measuring every linear matrix in one format."""
    inner = [m for m in loaded.matrices if m.kind in ("linear", "expert")]
    anchors = {m.name: anchor_of(space.formats[m.kind]) for m in inner}
    first = {m.name: tuple(f for f in (anchors.get(m.name),) if f) for m in loaded.matrices}
    known, missing = _tasks(loaded, first, job)
    found, peak = _run(loaded, missing, job, books, workers)
    costs = {record.matrix: record.two_sided for record in (*known, *found)}
    numel = sum(m.numel for m in inner)
    anchored = [Anchored(m, costs[m.name]) for m in inner if m.name in costs]
    useful = worth_measuring(anchored, space.formats, (bpw[0] * numel / 8, bpw[1] * numel / 8))
    return {m.name: tuple(useful.get(m.name, space.formats[m.kind])) for m in loaded.matrices}, peak


def _identity(loaded: LoadedModel, ids: Tensor, seed: int, prefix: Path | None) -> str:
    """Hash of all that the statistics depend on."""
    tokens = fields_sha256({"ids": ids.numpy().astype("<i8").reshape(-1).view(np.uint8)})
    parts = {"model": loaded.digest, "tokens": tokens, "shape": list(ids.shape), "seed": seed}
    if prefix is not None:
        parts["prefix"] = prefix_digest(prefix, loaded)
    parts["computed_in"] = str(compute_dtype(loaded))
    return content_key({**parts, "version": STATISTICS_VERSION})


def draw(loaded: LoadedModel, text: Text, nsamples: int, seqlen: int, seed: int, chat_template: bool) -> Tensor:
    """Calibration windows [n, seqlen] of `text`; says so when there are fewer than asked."""
    if loaded.tokenizer is None:
        raise UserError(f"{loaded.source} has no tokenizer; add its tokenizer files to the folder")
    ids = windows(text, loaded.tokenizer, nsamples, seqlen, seed, chat_template, loaded.max_positions)
    if text.is_fallback:
        LOG.warning("no --text: calibrating on %s; text like the model's own gives a better plan", text.description)
    if note := shortage(ids, nsamples):
        LOG.warning("%s", note)
    return ids


def measure(
    model: str | Path,
    *,
    text: str | Path | None = None,
    output: str | Path,
    space: str | Path | None = None,
    nsamples: int = 64,
    seqlen: int = 1024,
    seed: int = 0,
    jobs: int = -1,
    chat_template: bool = False,
    keep_codes: bool = True,
    bpw: tuple[float, float] | None = None,
    prefix: str | Path | None = None,
    backend: Backend = "processes",
    ray_address: str | None = None,
) -> MeasuredTable:
    """Measure every (matrix, format) of `space` for `model` and write the table to the folder `output`.

    `nsamples` windows of `seqlen` tokens of `text` calibrate; None is English text that Python itself carries. `jobs`
    worker processes, -1 for one a core. `backend` "ray" runs them on the cluster at `ray_address` (None: at
    RAY_ADDRESS, or the one this machine belongs to), whose machines must see `output` under the same path.
    `keep_codes=False` saves the disk of the packed candidates (about their bytes together) and makes `compile` encode
    the chosen ones again. `bpw`, the least and the most bits per weight that will be planned for, leaves out candidates
    that cannot matter there (see `bounding`); the table and its plans name them. `prefix`, an artifact of the same
    model, calibrates on the inputs that its weights give every block. Costs are in nats per token. Raises UserError.
    """
    began = time.monotonic()
    if bpw is not None and not 0 < bpw[0] <= bpw[1]:
        raise UserError(f"--bpw {bpw[0]} {bpw[1]}: expected the least and the most bits per weight, such as 2 4")
    with open_workers(backend, jobs, ray_address) as workers:
        before = None if prefix is None else Path(prefix)
        chosen, output, source = load_space(space), Path(output), load_text(text)
        loaded = load_model(model)
        check_storable(loaded)
        ids = draw(loaded, source, nsamples, seqlen, seed, chat_template)
        job = Job.at(output.absolute(), _identity(loaded, ids, seed, before), seed, keep_codes)
        report = calibrate(loaded, ids, job.statistics, seed=seed, prefix=before)
        for note in (*loaded.notes, *report.notes):
            LOG.warning("%s", note)
        calibrated = time.monotonic()
        books, shared = _codebooks(loaded, chosen, job)
        wanted, worker_bytes = {m.name: chosen.formats[m.kind] for m in loaded.matrices}, 0
        if bpw is not None:
            wanted, worker_bytes = _bounded(loaded, chosen, job, books, workers, bpw)
        known, missing = _tasks(loaded, wanted, job)
        records, largest = _run(loaded, missing, job, books, workers)
    facts = {
        "calibration_perplexity": report.perplexity,
        "calibration_seconds": round(calibrated - began, 1),
        "measurement_seconds": round(time.monotonic() - calibrated, 1),
        "peak_rss_bytes": float(peak_rss_bytes()),
        "worker_peak_rss_bytes": float(max(worker_bytes, largest)),
    }
    settings: dict[str, int | float | str | bool | None] = {
        "nsamples": len(ids),
        "seqlen": seqlen,
        "seed": seed,
        "space": chosen.name,
        "identity": job.identity,
    }
    table = _table(loaded, source, known + records, shared, settings, report.tokens, facts)
    with exclusive_lock(output):  # another machine may be adding its own
        table = _with_earlier(table, output)
        table = table.model_copy(update={"bounded": _unmeasured(loaded, chosen, table)})
        write_record(output / TABLE_FILE, table)
    return table


def _unmeasured(loaded: LoadedModel, space: Space, table: MeasuredTable) -> dict[str, int]:
    """Format -> how many matrices of the space were not measured in it."""
    known = {(record.matrix, record.format) for record in table.measurements}
    counts: dict[str, int] = {}
    for matrix in loaded.matrices:
        for fmt in space.formats[matrix.kind]:
            if (matrix.name, fmt.name) not in known:
                counts[fmt.name] = counts.get(fmt.name, 0) + 1
    return counts


def _with_earlier(table: MeasuredTable, output: Path) -> MeasuredTable:
    """`table` and what an earlier run measured in other formats on the same model, text and settings."""
    try:
        earlier = read_record(output / TABLE_FILE, MeasuredTable, "measure")
    except RecordError:  # none, or one of another version
        return table
    own = {"identity": table.settings["identity"], "codec": table.settings["codec"]}
    if {key: earlier.settings.get(key) for key in own} != own:
        return table
    known = {(r.matrix, r.format) for r in table.measurements}
    added = [r for r in earlier.measurements if (r.matrix, r.format) not in known]
    books = {record.key for record in table.shared}
    order = {m.name: i for i, m in enumerate(table.matrices)}
    return table.model_copy(
        update={
            "measurements": tuple(sorted([*table.measurements, *added], key=lambda r: (order[r.matrix], r.format))),
            "shared": (*table.shared, *(record for record in earlier.shared if record.key not in books)),
        }
    )


def _table(
    loaded: LoadedModel,
    text: Text,
    records: list[MeasurementRecord],
    shared: list[SharedRecord],
    settings: dict[str, int | float | str | bool | None],
    tokens: int,
    facts: dict[str, float],
) -> MeasuredTable:
    order = {m.name: i for i, m in enumerate(loaded.matrices)}
    return MeasuredTable.model_validate(
        {
            "model": loaded.source,
            "model_sha256": loaded.digest,
            "text": text.description,
            "text_sha256": text.sha256,
            "settings": {**settings, "codec": CODEC_VERSION, "tokens": tokens},
            "dtype": DTYPE_NAMES[loaded.dtype],
            "other_tensors": loaded.other_tensors(),
            "matrices": tuple(m.record() for m in loaded.matrices),
            "measurements": tuple(sorted(records, key=lambda r: (order[r.matrix], r.format))),
            "shared": tuple(shared),
            "kv_cache": kv_cache(loaded.model),
            "experts_per_token": experts_per_token(loaded.model),
            "base": facts,
        }
    )
