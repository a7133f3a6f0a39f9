"""A model that does not fit into memory gives the same statistics, artifacts and figures as one that does."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import ARCHITECTURES, VOCAB, save_tiny

from reallm.calibration import compute_dtype
from reallm.calibration.block_streaming import BlockStreamer, NotReproducedError
from reallm.calibration.calibrate import _converted, calibrate
from reallm.calibration.needs import calibration_needs, check_needs
from reallm.calibration.objective import make_objective
from reallm.errors import UserError
from reallm.evaluation.evaluate import evaluate
from reallm.models import large, source
from reallm.models.loaded import load_model
from reallm.runtime import open_model
from reallm.system.memory import available_memory
from reallm.system.scratch import Scratch, is_in_file

WINDOWS = torch.randint(5, VOCAB, (3, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def large_models(monkeypatch):
    """No model fits into memory, and the processor does not multiply bfloat16."""
    for module in (large, source, open_model):
        monkeypatch.setattr(module, "fits_in_memory", lambda weights: False)
    monkeypatch.setattr(compute_dtype, "_multiplies_bfloat16", lambda: False)


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.safetensors"))}


def mapped_files(tensor: torch.Tensor) -> str:
    """The line of the process's memory map that holds `tensor`."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(part, 16) for part in line.split()[0].split("-"))
        if first <= address < last:
            return line
    raise AssertionError("the tensor is nowhere in memory")


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"gemma", "gemma2", "gemma3"}))
def test_statistics_are_bit_equal(architecture, tmp_path, request):
    save_tiny(architecture, tmp_path / "model", dtype=torch.bfloat16)
    small = load_model(tmp_path / "model")
    assert small.scratch is None
    expected = calibrate(small, WINDOWS, tmp_path / "small", seed=3)
    request.getfixturevalue("large_models")
    loaded = load_model(tmp_path / "model", scratch=Scratch(tmp_path / "scratch"))
    report = calibrate(loaded, WINDOWS, tmp_path / "large", seed=3)
    assert loaded.digest == small.digest and report.perplexity == expected.perplexity
    assert digests(tmp_path / "large") == digests(tmp_path / "small")
    assert not list((tmp_path / "scratch").iterdir())


def test_statistics_of_a_model_that_is_run_as_a_whole_are_bit_equal(tmp_path, request, monkeypatch):
    def differs(*_arguments):
        raise NotReproducedError("a test says so")

    monkeypatch.setattr(BlockStreamer, "_check_reproduction", differs)
    save_tiny("llama", tmp_path / "model", dtype=torch.bfloat16)
    expected = calibrate(load_model(tmp_path / "model"), WINDOWS, tmp_path / "small", seed=3)
    request.getfixturevalue("large_models")
    loaded = load_model(tmp_path / "model", scratch=Scratch(tmp_path / "scratch"))
    report = calibrate(loaded, WINDOWS, tmp_path / "large", seed=3)
    assert report.notes == expected.notes == ["calibrated with the whole model at once, because a test says so"]
    assert digests(tmp_path / "large") == digests(tmp_path / "small")


@pytest.mark.parametrize("large", [False, True])
def test_a_pass_that_was_killed_when_it_ran_the_whole_model_finds_again_why_it_must(large, tmp_path, request):
    """The reason shows on the second window only, which a resumed pass does not run again if it is stored."""
    save_tiny("llama", tmp_path / "model")
    if large:
        request.getfixturevalue("large_models")
    loaded = load_model(tmp_path / "model", scratch=Scratch(tmp_path))

    def run() -> tuple[list[str], int]:
        streamer = BlockStreamer(loaded, tmp_path / "partial", make_objective(loaded, WINDOWS, 3))
        record = streamer._record
        if large:
            streamer._store_by_calls = _fail
        else:
            streamer._record = lambda window, stored: _fail() if window else record(window, stored)
        streamer.store_results()
        return list(streamer.notes), len(streamer.calls)

    assert run() == run() == (["calibrated with the whole model at once, because a later window differs"], 0)


def _fail(*_arguments):
    raise NotReproducedError("a later window differs")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's map of a process's memory")
def test_all_weights_are_in_files(large_models, tmp_path):
    save_tiny("qwen3_moe", tmp_path, dtype=torch.bfloat16)
    loaded = load_model(tmp_path, scratch=Scratch(tmp_path / "scratch"))
    where = {name: mapped_files(p) for name, p in loaded.model.named_parameters()}
    stacks = {name: line for name, line in where.items() if "experts" in name}
    assert stacks and all("scratch" in line and line.endswith("(deleted)") for line in stacks.values())
    rest = where.keys() - stacks.keys()
    assert rest and {name: where[name] for name in rest if not where[name].endswith("model.safetensors")} == {}
    assert all(is_in_file(loaded.model.get_parameter(name)) for name in rest)


def test_each_block_is_read_once_in_the_forward_pass(large_models, tmp_path):
    save_tiny("llama", tmp_path / "model", dtype=torch.bfloat16)
    loaded = load_model(tmp_path / "model", scratch=Scratch(tmp_path))
    blocks: list[str] = []
    streamer = BlockStreamer(loaded, tmp_path / "partial", make_objective(loaded, WINDOWS, 3))
    store_call = streamer._store_call
    streamer._store_call = lambda number, window: (blocks.append(number), store_call(number, window))
    with _converted(loaded):
        streamer.store_results()
    assert blocks == sorted(blocks) and len(blocks) == len(loaded.blocks) * (len(WINDOWS) - 1)


def test_an_interrupted_forward_pass_continues_at_the_block_it_had_reached(large_models, tmp_path, monkeypatch):
    save_tiny("llama", tmp_path / "model", dtype=torch.bfloat16)
    loaded = load_model(tmp_path / "model", scratch=Scratch(tmp_path))
    calibrate(loaded, WINDOWS, tmp_path / "whole", seed=3)
    store_call, calls = BlockStreamer._store_call, []

    def interrupted(self, number, window):
        calls.append(number)
        if number == 1 and window == 2:
            raise KeyboardInterrupt
        store_call(self, number, window)

    monkeypatch.setattr(BlockStreamer, "_store_call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(loaded, WINDOWS, tmp_path / "again", seed=3)
    monkeypatch.setattr(BlockStreamer, "_store_call", lambda *args: (calls.append(args[1]), store_call(*args)))
    calls.clear()
    calibrate(loaded, WINDOWS, tmp_path / "again", seed=3)
    assert calls and min(calls) == 1
    assert digests(tmp_path / "again") == digests(tmp_path / "whole")


def test_large_sums_are_in_files_and_equal(tmp_path, monkeypatch):
    save_tiny("qwen3_moe", tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    calibrate(loaded, WINDOWS, tmp_path / "memory", seed=3)
    made: list[Scratch] = []
    zeros = Scratch.zeros
    monkeypatch.setattr(Scratch, "zeros", lambda self, *args: (made.append(self), zeros(self, *args))[1])
    monkeypatch.setattr("reallm.calibration.block_streaming.available_memory", lambda: 0)
    calibrate(loaded, WINDOWS, tmp_path / "files", seed=3)
    assert made and digests(tmp_path / "files") == digests(tmp_path / "memory")


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt2", "llama"])
@pytest.mark.parametrize("available", [60_000, 0])
def test_statistics_of_parts_equal_those_of_whole_blocks(architecture, available, tmp_path, monkeypatch):
    save_tiny(architecture, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    calibrate(loaded, WINDOWS, tmp_path / "whole", seed=3)
    run_call, runs = BlockStreamer.run_call, []
    monkeypatch.setattr(BlockStreamer, "run_call", lambda *args: (runs.append(args[1]), run_call(*args))[1])
    monkeypatch.setattr("reallm.calibration.gathering.available_memory", lambda: available)
    calibrate(loaded, WINDOWS, tmp_path / "parts", seed=3)
    assert len(runs) > len(loaded.blocks)
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")


def test_an_evaluation_block_by_block_gives_the_same_figures(tmp_path, request):
    save_tiny("llama", tmp_path / "model", dtype=torch.bfloat16)
    (tmp_path / "text.txt").write_text("a bad cat sat on a mat and had a nap. " * 40)
    settings = {"text": str(tmp_path / "text.txt"), "seqlen": 32, "windows": 3, "progress": False}
    expected = evaluate(tmp_path / "model", against=tmp_path / "model", **settings).comparison
    request.getfixturevalue("large_models")
    opened = open_model.open_model(tmp_path / "model")
    assert {p.dtype for p in opened.model.get_submodule("model.layers.0").parameters()} == {torch.bfloat16}
    assert evaluate(tmp_path / "model", against=tmp_path / "model", **settings).comparison == expected


def test_what_calibration_takes_is_said_before_and_refused_where_it_cannot_be_had(large_models, tmp_path, monkeypatch):
    save_tiny("llama", tmp_path / "model")
    loaded = load_model(tmp_path / "model", scratch=Scratch(tmp_path))
    needs = calibration_needs(loaded, 3, 40)
    folder = tmp_path / "work"
    calibrate(loaded, WINDOWS, folder, seed=3)
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert 0.8 * stored < needs.disk < 1.3 * stored
    assert check_needs(loaded, 3, 40, folder).endswith("GiB of disk")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1 << 30))
    monkeypatch.setattr("reallm.calibration.needs._statistics_nbytes", lambda matrix: 1 << 30)
    assert check_needs(loaded, 3, 40, folder).endswith("it will stop when the disk is full, and can continue")
    monkeypatch.setattr("reallm.calibration.needs.available_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"GiB of memory, 0\.0 GiB are available; use a shorter --seqlen"):
        check_needs(loaded, 3, 40, folder)


def test_a_full_disk_is_one_line_that_names_the_folder(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(UserError, match=f"{tmp_path}: no space for 4096 bytes"):
        Scratch(tmp_path).zeros((1024,))
    assert not list(tmp_path.iterdir())


def test_the_limit_of_a_control_group_counts(tmp_path, monkeypatch):
    group = tmp_path / "mount" / "memory" / "job"
    group.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("4:memory:/job\n1:cpu:/other\n")
    (group / "memory.limit_in_bytes").write_text(f"{1 << 20}\n")
    (group / "memory.stat").write_text("total_rss 1000\ntotal_shmem 24\ntotal_cache 999999\n")
    monkeypatch.setattr("reallm.system.memory.CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr("reallm.system.memory.CGROUP_MOUNT", tmp_path / "mount")
    assert available_memory() == (1 << 20) - 1024
    (group / "memory.limit_in_bytes").write_text(f"{(1 << 63) - 4096}\n")
    assert available_memory() > 1 << 20


def test_the_limit_of_a_group_of_version_2_counts(tmp_path, monkeypatch):
    parent = tmp_path / "mount" / "slice"
    (parent / "job").mkdir(parents=True)
    (tmp_path / "cgroup").write_text("0::/slice/job\n")
    (parent / "job" / "memory.max").write_text("max\n")
    (parent / "memory.max").write_text("5000\n")
    (parent / "memory.stat").write_text("anon 1000\nfile 3000\n")
    monkeypatch.setattr("reallm.system.memory.CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr("reallm.system.memory.CGROUP_MOUNT", tmp_path / "mount")
    assert available_memory() == 4000
