"""Two processes with one window each train like one process with both windows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tuning import SEQLEN, linears, pack, write_letters

import reallm
from reallm.artifacts.verify import verify
from reallm.finetuning.run import finetune
from reallm.planner.tables.plan import read_plan
from reallm.runtime.install import packed_modules

pytestmark = pytest.mark.usefixtures("one_thread")
JOBS = {
    "two": ["--steps", "6"],
    "sharded-cached": ["--steps", "6"],
    "sharded-rerun": ["--steps", "6"],
    "nan": ["--steps", "6"],
    "blocks": ["--stages", "blocks"],
}
"""Name of a job and its output -> options of `reallm finetune`."""

SCRIPT = """
import json, os, sys
from pathlib import Path

import torch

from reallm.cli.main import main
from reallm.finetuning import teacher
from reallm.finetuning.distillation import DistillationLoss

base, rank = Path(sys.argv[1]), os.environ["RANK"]
compute_loss = DistillationLoss.forward
steps_to_nan, shards = [4], []


def nan_in_second_process(self, *arguments, **options):
    steps_to_nan[0] -= self.training
    loss = compute_loss(self, *arguments, **options)
    return loss * torch.nan if self.training and steps_to_nan[0] == 0 and rank == "1" else loss


def note_shards(self, *arguments, **options):
    weights = list(self.objective.teacher.runner.base_model.parameters())
    shards.append([sum(p.to_local().numel() for p in weights), sum(p.numel() for p in weights)])
    return compute_loss(self, *arguments, **options)


def run(name, options):
    os.dup2(os.open(base / f"{name}-{rank}.log", os.O_WRONLY | os.O_CREAT), 2)
    sharded = name.startswith("sharded")
    DistillationLoss.forward = nan_in_second_process if name == "nan" else note_shards if sharded else compute_loss
    if sharded:
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        shards.clear()
    cache_bytes = teacher.CACHE_BYTES
    if name == "sharded-rerun":
        teacher.CACHE_BYTES = 0
    common = ["--text", str(base / "text.txt"), "--seqlen", "SEQLEN", "--no-kernels", "--patience", "0"]
    sys.argv = ["reallm", "finetune", str(base / "out"), "-o", str(base / name), *common, *options]
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
    teacher.CACHE_BYTES = cache_bytes
    (base / f"{name}-{rank}.json").write_text(json.dumps({"code": code, "shards": shards if sharded else []}))


for name, options in json.loads((base / "jobs.json").read_text()).items():
    run(name, options)
""".replace("SEQLEN", str(SEQLEN))
"""Runs the command for every job in JOBS, one after another, in the processes that torchrun starts once.

In "nan" the second process gets NaN at its fourth step; in "sharded-*" each process notes at every step how many of the
dense model's weights it holds, and in "sharded-rerun" their hidden states do not fit into the cache.
"""


@dataclass(frozen=True)
class Job:
    """How one job ended in the two processes."""

    codes: tuple[int, int]
    logs: tuple[str, str]
    shards: list[tuple[int, int]]
    """Weights held by a process, and weights in all; at every step."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an artifact and a text, in which two processes have run all JOBS."""
    folder = tmp_path_factory.mktemp("processes")
    pack("llama", folder, linears("int2-g16", "tq2-l8+ldl+rot"))
    write_letters(folder / "text.txt", 40)
    (folder / "script.py").write_text(SCRIPT)
    (folder / "jobs.json").write_text(json.dumps(JOBS))
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(folder / "script.py"), str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", *launch],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(reallm.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    logs = "".join(path.read_text() for path in sorted(folder.glob("*.log")))
    assert done.returncode == 0, done.stderr + logs
    return folder


def job(base: Path, name: str) -> Job:
    records = [json.loads((base / f"{name}-{rank}.json").read_text()) for rank in range(2)]
    first, second = ((base / f"{name}-{rank}.log").read_text() for rank in range(2))
    shards = [(held, total) for record in records for held, total in record["shards"]]
    return Job((records[0]["code"], records[1]["code"]), (first, second), shards)


def weights_of(artifact: Path) -> bytes:
    return (artifact / "model.safetensors").read_bytes()


def test_the_command_writes_one_artifact_and_reports_once(base: Path) -> None:
    two = job(base, "two")
    assert two.codes == (0, 0), two.logs
    assert "".join(two.logs).count("wrote ") == 1 and not (base / "two.partial").exists()
    verify(base / "two")


def test_two_processes_train_as_one_with_twice_the_batch(base: Path) -> None:
    options = {"steps": 6, "batch_size": 2, "seqlen": SEQLEN, "patience": 0, "kernels": False}
    one = finetune(base / "out", text=str(base / "text.txt"), output=base / "one", **options)
    assert read_plan(one).file_bytes == read_plan(base / "two").file_bytes
    before, alone, both = (dict(packed_modules(reallm.load(base / name)[0])) for name in ("out", "one", "two"))
    for name, packed in alone.items():
        change = (packed.decode_now(torch.float32) - before[name].decode_now(torch.float32)).norm()
        gap = (packed.decode_now(torch.float32) - both[name].decode_now(torch.float32)).norm()
        assert gap < 0.02 * change  # sums in another order, then Adam


@pytest.mark.parametrize("name", ["sharded-cached", "sharded-rerun"])
def test_processes_that_shard_the_dense_model_get_the_same_result(base: Path, name: str) -> None:
    """Whether its hidden states are cached or it is run again at every step."""
    sharded = job(base, name)
    assert sharded.codes == (0, 0), sharded.logs
    assert sharded.shards and all(held <= 0.6 * total for held, total in sharded.shards)
    assert weights_of(base / name) == weights_of(base / "two")


def test_a_loss_that_is_not_finite_in_one_process_ends_training_in_both(base: Path) -> None:
    nan = job(base, "nan")
    assert nan.codes == (0, 0), nan.logs
    assert "the loss of step 4 is not finite" in nan.logs[0]
    verify(base / "nan")


def test_stages_for_one_process_are_refused(base: Path) -> None:
    blocks = job(base, "blocks")
    assert blocks.codes == (2, 2)
    assert "reallm: --stages blocks: 2 processes can only run end-to-end" in blocks.logs[0]
    assert not (base / "blocks").exists()
