"""What a GPU changes, on a machine that may have none: the device reaches every stage, and memory that runs out.

The device "cpu:0" stands for the GPU: tensors can be moved to it, and it is not equal to the device "cpu".
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny

from reallm.calibration import calibrate as calibration
from reallm.codecs.trellis import device_search
from reallm.compilation.compile import compile_plan
from reallm.errors import UserError
from reallm.evaluation.evaluate import evaluate
from reallm.measurement import measure as measuring
from reallm.measurement import measured_codes, tasks
from reallm.measurement.measure import measure
from reallm.measurement.workers.pool import RETRIES, open_workers, run_all
from reallm.measurement.workers.task import Task
from reallm.measurement.workers.threads import Threads
from reallm.models.loaded import load_model
from reallm.planner.tables.measured_table import MeasuredTable
from reallm.planning.plan import plan
from reallm.system.device import is_gpu

GPU = torch.device("cpu:0")


def recorded(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, seen: list[object], keyword: str | None) -> None:
    """Let every call of `module.name` add its device to `seen`: the argument `keyword`, or the last one."""
    original: Callable[..., Any] = getattr(module, name)

    def call(*args: Any, **keywords: Any) -> Any:
        seen.append(keywords[keyword] if keyword else args[-1])
        return original(*args, **keywords)

    monkeypatch.setattr(module, name, call)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny("llama", tmp_path_factory.mktemp("gpu") / "model")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    (folder / "space.yaml").write_text("linear: [tq2-l8+ldl2, int4-g16]\n")
    return folder


def run(model: Path, output: Path, device: str) -> MeasuredTable:
    text, space = model / "text.txt", model / "space.yaml"
    return measure(model, text=text, output=output, space=space, nsamples=2, seqlen=32, jobs=2, device=device)


def test_the_device_reaches_calibration_and_encoding(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cpu = run(model, tmp_path / "cpu", "cpu")
    seen: dict[str, list[object]] = {"calibration": [], "encoding": [], "workers": [], "compile": []}
    for module in (measuring, calibration):
        monkeypatch.setattr(module, "is_gpu", lambda device: device == GPU)
    recorded(monkeypatch, calibration, "placed", seen["calibration"], None)
    recorded(monkeypatch, tasks, "encode", seen["encoding"], "device")
    recorded(monkeypatch, measuring, "open_workers", seen["workers"], None)
    table = run(model, tmp_path / "gpu", "cpu:0")
    assert seen["calibration"] == [GPU]
    assert seen["encoding"] == [GPU] * len(table.measurements)
    assert seen["workers"] == [GPU]
    assert table.settings["device"] == "cpu" and "device" not in on_cpu.settings
    assert table.settings["identity"] != on_cpu.settings["identity"]  # statistics of another device are not reused
    # the tiny model's weights are float32 and stay so; "cpu:0" computes what the CPU does, now in threads
    key = [(r.matrix, r.format, r.codes_sha256) for r in on_cpu.measurements]
    assert sorted(key) == sorted((r.matrix, r.format, r.codes_sha256) for r in table.measurements)

    plan(tmp_path / "gpu", budget="4bpw", output=tmp_path / "plan.json")
    for path in (tmp_path / "gpu" / "cache").rglob("*.safetensors"):
        path.unlink()
    recorded(monkeypatch, measured_codes, "encode", seen["compile"], "device")
    compile_plan(tmp_path / "plan.json", tmp_path / "out", device="cpu:0", kernels=False)
    assert seen["compile"] and set(seen["compile"]) == {GPU}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_stages_run_on_a_gpu(model: Path, tmp_path: Path) -> None:
    on_cpu, table = run(model, tmp_path / "cpu", "cpu"), run(model, tmp_path / "gpu", "cuda")
    costs = {(r.matrix, r.format): r.two_sided for r in on_cpu.measurements}
    assert costs.keys() == {(r.matrix, r.format) for r in table.measurements}
    for record in table.measurements:  # the same statistics up to rounding, and codes that may differ in a few tiles
        assert record.two_sided == pytest.approx(costs[record.matrix, record.format], rel=0.1)
    plan(tmp_path / "gpu", budget="4bpw", output=tmp_path / "plan.json")
    compile_plan(tmp_path / "plan.json", tmp_path / "out", device="cuda", kernels=False)
    found = [
        evaluate(tmp_path / "out", text=str(model / "text.txt"), seqlen=32, windows=2, device=name)
        for name in ("cpu", "cuda")
    ]
    assert found[1].comparison.perplexity == pytest.approx(found[0].comparison.perplexity, rel=0.01)


def test_a_gpu_calibrates_in_bfloat16(model: Path) -> None:
    assert is_gpu(torch.device("cuda:1")) and not is_gpu(GPU)
    loaded = load_model(model)
    assert calibration.compute_dtype(loaded, torch.device("cuda")) == torch.bfloat16
    assert calibration.compute_dtype(loaded, torch.device("cpu")) == torch.float32


def failing(name: str, failures: int) -> Task[str]:
    """A task that finds the GPU's memory too small the first `failures` times."""
    left = [failures]

    def call() -> str:
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return name

    return Task(name, call)


def test_fewer_matrices_are_encoded_at_once_when_the_gpu_is_full() -> None:
    threads = torch.get_num_threads()
    with open_workers("processes", 8, gpu=GPU) as workers:
        assert isinstance(workers, Threads) and workers.slots == 8
        names = [f"m{number}" for number in range(6)]
        assert sorted(run_all(workers, (failing(name, 2 * (name == "m3")) for name in names))) == names
        assert workers.slots == 2
    assert torch.get_num_threads() == threads


def test_a_matrix_too_large_for_the_gpu_is_one_line() -> None:
    with (
        open_workers("processes", 4, gpu=GPU) as workers,
        pytest.raises(UserError, match=r"huge: .* the GPU out of memory .*; use fewer --jobs"),
    ):
        list(run_all(workers, [failing("huge", RETRIES + 1)]))


def test_a_cluster_does_not_take_a_gpu() -> None:
    with (
        pytest.raises(UserError, match="--device cuda is for --backend processes"),
        open_workers("ray", 1, gpu=torch.device("cuda")),
    ):
        pass


def test_fewer_instances_search_when_the_gpu_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def limited(*shape: int, **settings: Any) -> torch.Tensor:
        if shape[0] > 30:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return empty(*shape, **settings)

    monkeypatch.setattr(torch, "empty", limited)
    assert device_search._pointers(100, 4, 8, GPU).shape == (25, 4, 8)
    monkeypatch.setattr(torch, "empty", lambda *_shape, **_settings: limited(31))
    with pytest.raises(torch.OutOfMemoryError):
        device_search._pointers(100, 4, 8, GPU)
