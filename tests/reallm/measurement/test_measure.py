"""Measuring: costs are those of the stored bytes, and after any interruption the same command gives the same table."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from clusters import kill_an_encoder, local_cluster
from measuring import start_measure
from safetensors.torch import load_file
from tiny import save_tiny

from reallm.calibration.statistics import read_statistics
from reallm.codecs.encode import CODEC_VERSION
from reallm.compilation.compile import compile_plan
from reallm.errors import UserError
from reallm.kernels.codes.stored_fields import fields_sha256
from reallm.kernels.formats.formats import Format
from reallm.kernels.reference import decode_reference
from reallm.measurement import measure as measure_module
from reallm.measurement import shared_codebooks, tasks
from reallm.measurement.cache import Cache
from reallm.measurement.encoding import Job, matrix_metric
from reallm.measurement.measure import measure
from reallm.measurement.measured_codes import MeasuredCodes
from reallm.models.loaded import load_model
from reallm.planner.tables.measured_table import TABLE_FILE, MeasuredTable
from reallm.planner.tables.plan import Choice
from reallm.planner.tables.records import read_record, write_record
from reallm.planner.tables.tensor_layout import shared_key
from reallm.planning.plan import plan
from reallm.system.lock import exclusive_lock

pytestmark = pytest.mark.usefixtures("one_thread")

SPACE = """
linear: [int3-g16, lm2-g32-dq6x64+ldl, aq1x3-d4, aq1x4-d4-shared, nf2-g16+r2]
embedding: [int4-g16, bf16]
"""
SETTINGS = {"nsamples": 2, "seqlen": 32, "seed": 1, "jobs": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny tied llama in bfloat16, with a text and a space beside it."""
    folder = save_tiny("llama-tied", tmp_path_factory.mktemp("model"), dtype=torch.bfloat16)
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    (folder / "space.yaml").write_text(SPACE)
    return folder


def test_every_uncompressed_tensor_keeps_its_own_dtype(model: Path, tmp_path: Path) -> None:
    loaded = load_model(model)
    norm = loaded.model.get_submodule("model.norm")  # tensors that the model does not compute with
    norm.bias = torch.nn.Parameter(torch.full_like(norm.weight, 1 / 3, dtype=torch.float32))
    norm.register_buffer("steps", torch.tensor([2**40 + 1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure_module, "load_model", lambda source, scratch: loaded)
        table = run(model, tmp_path / "work")
    assert table.other_dtypes == {"model.norm.bias": "f32", "model.norm.steps": "i64"}
    made = plan(tmp_path / "work", budget="4bpw")
    write_record(tmp_path / "plan.json", made)
    artifact = compile_plan(tmp_path / "plan.json", tmp_path / "out", model=loaded)
    tensors = load_file(artifact / "model.safetensors")
    assert sum(file.stat().st_size for file in artifact.glob("*.safetensors")) == made.file_bytes
    assert torch.equal(tensors["model.norm.bias"], norm.bias) and torch.equal(tensors["model.norm.steps"], norm.steps)
    assert tensors["model.norm.weight"].dtype == torch.bfloat16


def run(model: Path, output: Path, **changes: int | bool | str) -> MeasuredTable:
    return measure(model, text=model / "text.txt", space=model / "space.yaml", output=output, **{**SETTINGS, **changes})


@pytest.fixture(scope="module")
def measured(one_thread: None, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder, made without interruption; tests must not change it."""
    output = tmp_path_factory.mktemp("measured") / "work"
    run(model, output)
    return output


def content(folder: Path) -> dict[str, object]:
    """The table without its timings, and without the name of the folder in it."""
    table = json.loads((folder / TABLE_FILE).read_text())
    base = table.pop("base")
    assert base["calibration_perplexity"] > 1
    assert base["peak_rss_bytes"] > 1 << 20
    assert base["worker_peak_rss_bytes"] >= 0  # 0 when the cache had everything
    for record in table["measurements"]:
        assert record.pop("seconds") >= 0
    return table


def choices_of(table: MeasuredTable) -> list[Choice]:
    """One choice per measurement, except dense ones, which stay the model's own tensors."""
    matrices = {m.name: m for m in table.matrices}
    return [
        Choice(
            matrix=record.matrix,
            format=record.format,
            rows=matrices[record.matrix].rows,
            cols=matrices[record.matrix].cols,
            kind=matrices[record.matrix].kind,
            family=matrices[record.matrix].family,
            nbytes=record.nbytes,
            cost=record.two_sided,
            codes_sha256=record.codes_sha256,
        )
        for record in table.measurements
        if record.format != "bf16"
    ]


# -- what is measured --------------------------------------------------------------------------------------------------


def test_costs_are_those_of_the_packed_bytes(model: Path, measured: Path) -> None:
    """Decoded by the independent reference, weighted in float64 with the statistics on disk."""
    table, loaded = read_record(measured / TABLE_FILE, MeasuredTable, "measure"), load_model(model)
    job = Job.at(measured, str(table.settings["identity"]), 1)
    assert len(table.measurements) == 14 * 5 + 2
    matrices = {m.name: m for m in loaded.matrices}
    for record in table.measurements:
        matrix, fmt = matrices[record.matrix], Format.parse(record.format)
        fields = job.cache.fields(job.key(matrix.name, fmt))
        assert fields is not None and record.nbytes == sum(value.nbytes for value in fields.values())
        assert record.nbytes == fmt.nbytes(matrix.rows, matrix.cols)
        key = shared_key(fmt, matrix.family)
        books = (job.cache.fields(job.codebook_key(key)) or {}) if key else {}
        weight = decode_reference(fmt, {**fields, **books}, matrix.rows, matrix.cols)
        W = loaded.weight(matrix).double().numpy()
        metric = matrix_metric(matrix, read_statistics(job.statistics, matrix.block, [matrix]))
        E, H, F = W - weight, metric.hessian.double().numpy(), metric.fisher.double().numpy()
        rows = np.ones(len(W)) if metric.row_weight is None else metric.row_weight.double().numpy()
        extra = 0.0 if metric.extra_fisher is None else (metric.extra_fisher.double().numpy() * E**2).sum()
        guided = 0.5 * ((rows[:, None] * (E @ H) * E).sum() + extra)
        # float32 sums of 80 terms that may cancel: 80 x 2^-24 of the sum of magnitudes
        magnitude = 0.5 * ((rows[:, None] * (np.abs(E) @ np.abs(H)) * np.abs(E)).sum() + extra)
        assert record.guided == pytest.approx(guided, rel=1e-5, abs=80 * 2.0**-24 * magnitude), record
        assert record.fisher == pytest.approx(0.5 * (F * E**2).sum(), rel=1e-4)
        assert record.relative == pytest.approx((E**2).sum() / (W**2).sum(), rel=1e-4)
        assert record.guided > 0 or record.format == "bf16"


def test_every_matrix_is_measured_in_every_format_of_its_kind(measured: Path) -> None:
    table = read_record(measured / TABLE_FILE, MeasuredTable, "measure")
    pairs = {(m.matrix, m.format) for m in table.measurements}
    linear = ["int3-g16", "lm2-g32-dq6x64+ldl", "aq1x3-d4", "aq1x4-d4-shared", "nf2-g16+r2"]
    formats = {"linear": linear, "embedding": ["int4-g16", "bf16"]}
    assert pairs == {(m.name, name) for m in table.matrices for name in formats[m.kind]}
    assert {record.key.split("@")[1] for record in table.shared} == {m.family for m in table.matrices} - {
        "model.embed_tokens"
    }
    assert table.settings["nsamples"] == 2 and table.settings["tokens"] == 64


def test_a_second_run_measures_nothing(model: Path, measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(measured)
    monkeypatch.setattr(tasks, "encode", None)
    monkeypatch.setattr(shared_codebooks, "fit_shared_codebooks", None)
    run(model, measured)
    assert content(measured) == before


def test_the_digest_of_a_table_does_not_depend_on_timings(measured: Path) -> None:
    table = read_record(measured / TABLE_FILE, MeasuredTable, "measure")
    slower = [record.model_copy(update={"seconds": record.seconds + 1}) for record in table.measurements]
    assert table.model_copy(update={"measurements": tuple(slower), "base": {}}).digest() == table.digest()
    costlier = [record.model_copy(update={"two_sided": record.two_sided * 2}) for record in table.measurements]
    assert table.model_copy(update={"measurements": tuple(costlier)}).digest() != table.digest()


def test_codebooks_do_not_depend_on_the_number_of_threads(model: Path, measured: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    shutil.copytree(measured / "statistics", tmp_path / "statistics")
    torch.set_num_threads(3)
    try:
        run(model, tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert content(tmp_path) == content(measured)


# -- what is kept ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_codes", [True, False])
def test_codes_are_read_back_or_encoded_again_alike(
    model: Path, tmp_path: Path, keep_codes: bool, caplog: pytest.LogCaptureFixture
) -> None:
    table = run(model, tmp_path, keep_codes=keep_codes)
    stored = list((tmp_path / "cache").rglob("*.safetensors"))
    assert len(stored) == len(table.shared) + (len(table.measurements) if keep_codes else 0)
    encoded = MeasuredCodes(tmp_path, load_model(model))
    choices = choices_of(table)
    for choice in choices[::7]:
        assert fields_sha256(encoded.fields(choice)) == choice.codes_sha256
    encoded.log_missing(choices)
    logged = [record.getMessage() for record in caplog.records if "again" in record.getMessage()]
    assert len(logged) == (not keep_codes) and all(f"of {len(choices)} matrices again" in line for line in logged)


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damaged_codes_are_encoded_again(damage: str, model: Path, measured: Path, tmp_path: Path) -> None:
    shutil.copytree(measured, tmp_path / "work")
    table, encoded = (
        read_record(measured / TABLE_FILE, MeasuredTable, "measure"),
        MeasuredCodes(tmp_path / "work", load_model(model)),
    )
    for choice in choices_of(table)[::9]:
        key = encoded.job.key(choice.matrix, Format.parse(choice.format))
        (path,) = (tmp_path / "work" / "cache").rglob(f"{key}.safetensors")
        raw = bytearray(path.read_bytes())
        raw[8 + int.from_bytes(raw[:8], "little")] ^= 1  # the first byte of the first field
        path.write_bytes(raw if damage == "flip" else raw[:-3])
        assert fields_sha256(encoded.fields(choice)) == choice.codes_sha256


def test_another_model_is_refused(measured: Path, tmp_path: Path) -> None:
    other = load_model(save_tiny("llama-tied", tmp_path, seed=9, dtype=torch.bfloat16))
    with pytest.raises(UserError, match="was measured on another model"):
        MeasuredCodes(measured, other)


# -- what stops it -----------------------------------------------------------------------------------------------------


def test_truncated_entries_are_measured_again(model: Path, measured: Path, tmp_path: Path) -> None:
    shutil.copytree(measured, tmp_path / "work")
    files = sorted((tmp_path / "work" / "cache").rglob("*.*"))
    for path in files[::3]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (tmp_path / "work" / TABLE_FILE).unlink()
    run(model, tmp_path / "work")
    assert content(tmp_path / "work") == content(measured)


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
@pytest.mark.parametrize("method", ["put_fields", "put_measurement"])
def test_an_interrupt_and_a_full_disk_leave_the_folder_usable(
    method: str, stop: BaseException, model: Path, measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = getattr(Cache, method), []

    def stopping(self: Cache, key: str, value: object) -> None:
        calls.append(key)
        if len(calls) == 25:
            raise stop
        original(self, key, value)

    monkeypatch.setattr(Cache, method, stopping)
    with pytest.raises(type(stop)):
        run(model, tmp_path)
    assert not (tmp_path / TABLE_FILE).exists()
    done = len(calls) - 1
    run(model, tmp_path)
    assert content(tmp_path) == content(measured)
    total = 72 + (7 if method == "put_fields" else 0)
    again = len(calls) - 25
    assert again <= total - done + (1 if method == "put_fields" else 0)  # stored results were not computed again
    assert not list(tmp_path.rglob("*.partial"))


def wait_for(process: BaseProcess, folder: Path, pattern: str, count: int) -> None:
    """Wait until the process has written `count` files."""
    end = time.monotonic() + 120
    while len(list(folder.rglob(pattern))) < count:
        assert process.is_alive() and time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize(("pattern", "count"), [("block-*.safetensors", 1), ("*.json", 15)])
def test_a_killed_run_costs_only_time(pattern: str, count: int, model: Path, measured: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    process = start_measure(model, work, tmp_path / "stderr", **SETTINGS)
    wait_for(process, work, pattern, count)
    process.kill()
    process.join()
    assert not (work / TABLE_FILE).exists()
    run(model, work)
    assert content(work) == content(measured)


def test_two_processes_at_once_end_well(model: Path, measured: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    processes = [start_measure(model, work, tmp_path / f"stderr{i}", **SETTINGS) for i in range(2)]
    for i, process in enumerate(processes):
        process.join(timeout=180)
        assert process.exitcode == 0, (tmp_path / f"stderr{i}").read_text()[-2000:]
    assert content(work) == content(measured)
    assert not list(work.rglob("*.partial"))


# -- who does it -------------------------------------------------------------------------------------------------------


@contextmanager
def killing(folder: Path, entries: int, victim: Callable[[], bool]) -> Iterator[list[float]]:
    """Within it, once `entries` measurements are in the cache, `victim` is called until it reports a kill."""
    over, killed = threading.Event(), []

    def watch() -> None:
        while not over.wait(0.005) and not killed:
            if len(list(folder.glob("cache/*/*.json"))) >= entries and victim():
                killed.append(time.monotonic())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def files(folder: Path) -> dict[str, bytes]:
    """The bytes of every file of codes and statistics, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def assert_same(folder: Path, expected: Path) -> None:
    """Equal byte for byte, except for timings in the JSON, and without files left over."""
    assert content(folder) == content(expected)
    assert files(folder) == files(expected)
    assert not list(folder.glob("weights-*"))


def test_two_workers_of_which_one_is_killed_give_the_same_bytes_as_one(
    model: Path, measured: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    threads = torch.get_num_threads()
    with killing(tmp_path, 15, kill_an_encoder) as killed:
        run(model, tmp_path, jobs=2)
    assert torch.get_num_threads() == threads
    assert killed and any("its worker died (SIGKILL(-9)); retry 1 of 3" in line for line in caplog.messages)
    assert_same(tmp_path, measured)


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install -e '.[ray]'")
def test_a_cluster_that_loses_a_worker_and_a_machine_gives_the_same_bytes(
    model: Path, measured: Path, tmp_path: Path
) -> None:
    with local_cluster(2) as (cluster, nodes):

        def kill_a_machine() -> bool:
            cluster.remove_node(nodes[0], allow_graceful=False)
            return True

        with killing(tmp_path, 10, kill_an_encoder) as first, killing(tmp_path, 30, kill_a_machine) as second:
            run(model, tmp_path, backend="ray", ray_address=cluster.address, jobs=-1)
    assert first and second
    assert_same(tmp_path, measured)


def test_ctrl_c_leaves_no_worker(model: Path, tmp_path: Path) -> None:
    """The signal goes to the whole process group, as a terminal sends it."""
    work = tmp_path / "work"
    process = start_measure(model, work, tmp_path / "stderr", **SETTINGS | {"jobs": 2})
    assert process.pid is not None
    wait_for(process, work, "*.json", 15)
    os.killpg(process.pid, signal.SIGINT)
    process.join(timeout=60)
    assert process.exitcode == 1 and "KeyboardInterrupt" in (tmp_path / "stderr").read_text()
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # loky's resource tracker ends a moment later
            os.killpg(process.pid, 0)
            time.sleep(0.1)
    assert not list(work.glob("weights-*"))


def test_a_worker_of_another_version_is_refused(model: Path, tmp_path: Path) -> None:
    job = Job.at(tmp_path, "0" * 64, 1)
    with pytest.raises(UserError, match="install the same on every machine"):
        tasks.measure_matrix(tmp_path / "w.safetensors", load_model(model).matrices[0], [], job, {}, CODEC_VERSION - 1)


def test_a_table_that_another_machine_writes_meanwhile_is_joined(
    model: Path, measured: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run in one format ends while another process holds the folder, which then leaves a table of all formats."""
    work, space = tmp_path / "work", tmp_path / "one.yaml"
    shutil.copytree(measured, work)
    (work / TABLE_FILE).unlink()
    space.write_text("linear: [int3-g16]\n")
    ours = threading.Thread(
        target=measure, args=[model], kwargs={"text": model / "text.txt", "space": space, "output": work, **SETTINGS}
    )
    with exclusive_lock(work):
        ours.start()
        while "another process is working" not in caplog.text:
            assert ours.is_alive()
            time.sleep(0.01)
        shutil.copy(measured / TABLE_FILE, work)
    ours.join()
    assert content(work)["measurements"] == content(measured)["measurements"]
