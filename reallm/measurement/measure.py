"""Measuring a model: every matrix is encoded in every candidate format, and the cost of its error is computed.

Calibration comes first, then the fitting of shared codebooks, then one task per matrix (`schedule`, `tasks`). Workers
read the weights, the statistics and the cache in the work folder, so they may also run on other machines that share it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reallm.calibration.calibrate import CalibrationReport, calibrate
from reallm.calibration.compute_dtype import compute_dtype
from reallm.errors import UserError
from reallm.kernels.codes.stored_fields import fields_sha256
from reallm.kernels.formats.formats import Format
from reallm.kernels.storage.layout import CONFIG_FILE
from reallm.models.image_texts import ImageTexts, read_image_texts
from reallm.models.kv_cache import kv_cache
from reallm.models.loaded import LoadedModel, check_storable, load_model
from reallm.models.matrix import Matrix
from reallm.planner.problem.candidates import matching_names, parse_pin
from reallm.planner.problem.plan_options import PlanOptions
from reallm.planner.tables.budget import parse_budget
from reallm.planner.tables.measured_table import MeasuredTable, PredictionRecord
from reallm.system.device import is_gpu, parse_device
from reallm.system.memory import peak_rss_bytes
from reallm.system.scratch import Scratch

from .cache import content_key
from .calibration_text import WindowSettings, calibration_windows, given_text
from .compressed_prefix import prefix_digest, prefix_weights
from .encoding import Job
from .needed import DEFAULT_GAP, NeededMeasurement, check_budget
from .schedule import Measured, measure_formats, split_by_cache
from .screening import AnchorCost, choose_anchor, worth_measuring
from .search_space import Space, load_space
from .second_order_check import check_second_order, warning
from .shared_codebooks import load_or_fit_codebooks
from .table import Settings, assemble_table, write_table
from .workers.pool import Backend, open_workers
from .workers.task import Workers

LOG = logging.getLogger(__name__)
STATISTICS_VERSION = 2  # part of every cache key: raise it whenever the statistics may change


def measure(
    model: str | Path,
    *,
    text: str | Path | None = None,
    output: str | Path,
    space: str | Path | Space | None = None,
    nsamples: int = 64,
    seqlen: int = 1024,
    seed: int = 0,
    jobs: int = -1,
    chat_template: bool = False,
    keep_codes: bool = True,
    bpw: tuple[float, float] | None = None,
    budget: str | None = None,
    options: PlanOptions | None = None,
    gap: float = DEFAULT_GAP,
    prefix: str | Path | None = None,
    images: str | Path | None = None,
    pins: Sequence[str] = (),
    backend: Backend = "processes",
    ray_address: str | None = None,
    device: str = "cpu",
) -> MeasuredTable:
    """Measure the bytes and the cost of each matrix of a model in each candidate format, and write the measured table.

    Costs are in nats per token. Repeat the call to resume an interrupted run.

    Parameters
    ----------
    model
        A folder, a GGUF file or a name on the Hugging Face hub.
    text
        The calibration text: a file, a data set, or "self" for text that the model writes itself, sampled at
        temperature 1. None is the beginning of C4, streamed from the hub; without a connection the model's own text,
        and for a model that cannot write, such as an encoder, English text that comes with Python.
    output
        The folder for the table, the statistics and the cache of codes; created if necessary.
    space
        The candidate formats: the name of a preset, a YAML file (see `search_space`) or a Space; None for the default
        preset.
    nsamples
        Number of calibration windows.
    seqlen
        Tokens per calibration window.
    seed
        Seed of all random choices.
    jobs
        Number of matrices encoded at the same time; -1 for one per core.
    chat_template
        Wrap plain documents in the model's chat template, as messages from a user.
    keep_codes
        Keep the packed codes of all candidates in the cache. False saves about the sum of their sizes on disk, and
        `compile` then encodes the chosen candidates again.
    bpw
        The lowest and the highest number of bits per weight that you will plan for. Candidates that no plan in this
        range would choose are not measured (see `screening`); the table and plans made from it list how many. None
        measures every candidate.
    budget
        Measure only the candidates that the best plan within this budget ("3.0bpw", "48MiB") needs, and predict the
        others (see `needed`): two to three times faster than encoding the model in every format. The table holds the
        predictions, and a plan made from it says how much better they might make it.
    options
        What will be asked of the plan besides the budget; its formats, preset and target must be left to `space`.
    gap
        With `budget`: continue measuring until the unmeasured candidates can lower the predicted loss by no more than
        this share of it.
    prefix
        An artifact of the same model: calibrate on the inputs that each block receives in this compressed model.
    images
        Texts with images on which a vision-language model is calibrated too, so that its vision tower can be
        compressed too: a file with a line {"image": "cat.png", "text": "A cat."} for each.
    pins
        "REGEX=FORMAT": also measure every matrix whose name the regex matches in this format, so that a plan can pin
        it. A matrix that the calibration does not run, such as one of a vision tower, is measured only so: it is
        encoded by its weights alone, and what its error costs is unknown.
    backend
        Where matrices are encoded: in "processes" on this machine, or on a "ray" cluster.
    ray_address
        Address of the Ray cluster. None uses the environment variable RAY_ADDRESS or, without it, the cluster that this
        machine belongs to. All machines of the cluster must have access to `output` under the same path.
    device
        Where to run the model and to search trellises: "cpu", "cuda", "cuda:1" or "auto". On a GPU the model is run in
        bfloat16 and `jobs` threads of this process encode. Other formats than trellises are encoded on the CPU.

    Returns
    -------
    MeasuredTable
        The table as written, including what earlier runs measured on the same model, text and settings.

    Raises
    ------
    UserError
        For arguments that cannot be used, a model that cannot be measured, and workers that keep dying.

    Examples
    --------
    >>> table = reallm.measure("model", text="train.txt", output="work", space="space.yaml", nsamples=8, seqlen=32)
    >>> len(table.matrices), len(table.measurements)
    (16, 42)
    """
    started = time.monotonic()
    if bpw is not None and not 0 < bpw[0] <= bpw[1]:
        raise UserError(f"--bpw {bpw[0]} {bpw[1]}: expected the least and the most bits per weight, such as 2 4")
    if bpw is not None and budget is not None:
        raise UserError("--bpw and --budget exclude each other: --budget measures for one budget, --bpw for a range")
    wanted, options = None if budget is None else parse_budget(budget), options or PlanOptions()
    _check_work_folder(Path(output))
    place = parse_device(device)
    with open_workers(backend, jobs, ray_address, place if is_gpu(place) else None) as workers:
        prefix_path = None if prefix is None else Path(prefix)
        candidates, output, given = load_space(space), Path(output), given_text(text)
        loaded = load_model(model, scratch=Scratch(output))
        check_storable(loaded)
        cache = kv_cache(loaded.model)
        names = [matrix.name for matrix in loaded.matrices]
        pinned = [(name, fmt) for regex, fmt in map(parse_pin, pins) for name in matching_names(names, "--pin", regex)]
        windows = WindowSettings(nsamples, seqlen, seed, chat_template)
        ids, calibration_text = calibration_windows(loaded, text, given, output, windows)
        image_texts = None if images is None else read_image_texts(Path(images), loaded)
        identity = _identity(loaded, ids, seed, prefix_path, image_texts, place)
        job = Job.at(output.absolute(), identity, seed, keep_codes, place)
        if wanted is not None:
            trial = assemble_table(loaded, calibration_text, (), {}, CalibrationReport(0, 0.0, 0.0), cache)
            check_budget(trial, {m.name: candidates.formats[m.kind] for m in loaded.matrices}, wanted, options)
        weights = None if prefix_path is None else prefix_weights(prefix_path, loaded)
        processor_began = time.process_time()
        report = calibrate(loaded, ids, job.statistics, seed=seed, weights=weights, images=image_texts, device=place)
        for note in (*loaded.notes, *report.notes):
            LOG.warning("%s", note)
        calibrated, processor_seconds = time.monotonic(), time.process_time() - processor_began
        formats: Mapping[str, Sequence[Format]] = {
            m.name: () if m.name in report.kept else candidates.formats[m.kind] for m in loaded.matrices
        }
        formats = _with_pinned(formats, pinned)
        codebooks, shared = load_or_fit_codebooks(loaded, formats, job)
        settings = _settings(candidates, job, ids, chat_template=chat_template, images=images, prefix=prefix)
        table = assemble_table(loaded, calibration_text, shared, settings, report, cache)
        predictions: list[PredictionRecord] = []
        if wanted is not None:
            encode = partial(measure_formats, loaded, job=job, codebooks=codebooks, workers=workers)
            known, _ = split_by_cache(loaded, formats, job)
            needed = NeededMeasurement(table, loaded.matrices, formats, encode, wanted, options, gap)
            measured, predictions = needed.run(known)
        else:
            screened = Measured([], 0)
            if bpw is not None:
                measurable = [m for m in loaded.matrices if m.name not in report.kept]
                useful, screened = _screen(loaded, measurable, candidates, job, codebooks, workers, bpw)
                formats = _with_pinned({**formats, **useful}, pinned)
            measured = measure_formats(loaded, formats, job, codebooks, workers)
            measured = replace(measured, worker_peak_bytes=max(measured.worker_peak_bytes, screened.worker_peak_bytes))
    doubt = warning(check_second_order(loaded, ids, measured.records, job, codebooks))
    if doubt is not None:
        LOG.warning("%s", doubt)
    base = {
        **({"calibration_perplexity": report.perplexity} if loaded.sentence_encoder is None else {}),
        "calibration_seconds": round(calibrated - started, 1),
        "calibration_processor_seconds": round(processor_seconds, 1),
        "measurement_seconds": round(time.monotonic() - calibrated, 1),
        "peak_rss_bytes": float(peak_rss_bytes()),
        "worker_peak_rss_bytes": float(measured.worker_peak_bytes),
    }
    found = {
        "measurements": tuple(measured.records),
        "predictions": tuple(predictions),
        "doubts": () if doubt is None else (doubt,),
        "base": base,
    }
    return write_table(table.model_copy(update=found), candidates, output)


def _settings(
    space: Space,
    job: Job,
    ids: Tensor,
    *,
    chat_template: bool,
    images: str | Path | None,
    prefix: str | Path | None,
) -> Settings:
    """The settings of a run, as its table lists them; those that few runs use are left out unless they are used."""
    count, seqlen = ids.shape
    settings: dict[str, int | float | str | bool | None] = {"nsamples": count, "seqlen": seqlen, "seed": job.seed}
    settings |= {"space": space.name, "identity": job.identity}
    if chat_template:
        settings["chat_template"] = True
    if images is not None:
        settings["images"] = str(images)
    if prefix is not None:
        settings["prefix"] = str(prefix)
    if is_gpu(job.device):
        settings["device"] = job.device.type
    return settings


def _check_work_folder(output: Path) -> None:
    """Raise UserError if `output` cannot be a work folder: a file, or the folder of a model, which must not change."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; expected a work folder, which may be a new one")
    if (output / CONFIG_FILE).exists():
        raise UserError(f"--output {output} is the folder of a model; expected a work folder, which may be a new one")


def _identity(
    loaded: LoadedModel,
    ids: Tensor,
    seed: int,
    prefix: Path | None,
    images: ImageTexts | None,
    device: torch.device,
) -> str:
    """Hash of everything that the statistics depend on."""
    tokens = fields_sha256({"ids": ids.numpy().astype("<i8").reshape(-1).view(np.uint8)})
    parts = {"model": loaded.digest, "tokens": tokens, "shape": list(ids.shape), "seed": seed}
    if prefix is not None:
        parts["prefix"] = prefix_digest(prefix, loaded)
    if images is not None:
        parts["images"] = images.digest()
    parts["computed_in"] = str(compute_dtype(loaded, device))
    if is_gpu(device):
        parts["device"] = device.type
    return content_key({**parts, "version": STATISTICS_VERSION})


def _with_pinned(
    formats: Mapping[str, Sequence[Format]], pinned: Sequence[tuple[str, Format]]
) -> dict[str, Sequence[Format]]:
    """`formats` by matrix name, with the `pinned` (matrix name, format) added where they are missing."""
    result = dict(formats)
    for name, fmt in pinned:
        if fmt not in result[name]:
            result[name] = (*result[name], fmt)
    return result


def _screen(
    loaded: LoadedModel,
    matrices: Sequence[Matrix],
    space: Space,
    job: Job,
    codebooks: Mapping[str, Tensor],
    workers: Workers,
    bpw: tuple[float, float],
) -> tuple[dict[str, Sequence[Format]], Measured]:
    """Measure the linear ones of `matrices` in one anchor format, and rule out candidates that no plan would choose.

    Returns the formats still to be measured, by matrix name, and the measurements in the anchor formats.
    """
    inner = [m for m in matrices if m.kind in ("linear", "expert")]
    anchors = {m.name: choose_anchor(space.formats[m.kind]) for m in inner}
    anchor_formats = {m.name: [fmt] if (fmt := anchors.get(m.name)) else [] for m in loaded.matrices}
    measured = measure_formats(loaded, anchor_formats, job, codebooks, workers)
    costs = {record.matrix: record.two_sided for record in measured.records}
    numel = sum(m.numel for m in inner)
    anchor_costs = [AnchorCost(m, costs[m.name]) for m in inner if m.name in costs]
    useful = worth_measuring(anchor_costs, space.formats, (bpw[0] * numel / 8, bpw[1] * numel / 8))
    return {m.name: useful.get(m.name, space.formats[m.kind]) for m in matrices}, measured
