"""Two processes with a window each train as one process with both."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tuning import SEQLEN, linears, pack, write_letters

import reallm
from reallm.artifacts.verify import read_plan, verify
from reallm.finetuning.run import finetune
from reallm.runtime.install import packed_modules

FAILING = """
import os
import torch
from reallm.cli import main
from reallm.finetuning.distillation import Student

compute, left = Student.forward, [4]


def forward(self, *arguments, **options):
    left[0] -= self.training
    loss = compute(self, *arguments, **options)
    return loss * torch.nan if self.training and left[0] == 0 and os.environ["RANK"] == "1" else loss


Student.forward = forward
main()
"""
"""The command, whose second process gets NaN at its fourth step."""

SHARING = """
import os
from reallm.cli import main
from reallm.finetuning.distillation import Student

compute = Student.forward


def forward(self, *arguments, **options):
    weights = list(self.objective.original.runner.base_model.parameters())
    own, whole = sum(p.to_local().numel() for p in weights), sum(p.numel() for p in weights)
    with open(f"{__file__}-{os.environ['RANK']}", "a") as file:
        print(own, whole, file=file)
    return compute(self, *arguments, **options)


Student.forward = forward
main()
"""
"""The command, which writes down at every step how much of the dense model a process holds."""


def run(
    artifact: Path, text: Path, output: Path, *options: str, program: Sequence[str] = ("-m", "reallm"), **more: str
) -> subprocess.CompletedProcess[str]:
    """`reallm finetune` in two processes; `more` of the environment."""
    root = str(Path(reallm.__file__).parents[1])
    given = ["--text", str(text), "-o", str(output), "--seqlen", str(SEQLEN), "--no-kernels", "--patience", "0"]
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program, "finetune"]
    return subprocess.run(
        [sys.executable, "-m", *launch, str(artifact), *given, *options],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root} | more,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def weights_of(artifact: Path) -> bytes:
    return (artifact / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    pack("llama", folder, linears("int2-g16", "tq2-l8+ldl+rot"))
    write_letters(folder / "text.txt", 40)
    return folder


@pytest.fixture(scope="module")
def two(base: Path) -> Path:
    """What two processes make of it."""
    done = run(base / "out", base / "text.txt", base / "two", "--steps", "6")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("wrote ") == 1 and not (base / "two.partial").exists()
    return base / "two"


def test_two_processes_train_as_one_with_twice_the_batch(base: Path, two: Path) -> None:
    verify(two)
    options = {"steps": 6, "batch_size": 2, "seqlen": SEQLEN, "patience": 0, "kernels": False}
    one = finetune(base / "out", text=str(base / "text.txt"), output=base / "one", **options)
    assert read_plan(one).file_bytes == read_plan(two).file_bytes
    before, alone, both = (dict(packed_modules(reallm.load(base / name)[0])) for name in ("out", "one", "two"))
    for name, packed in alone.items():
        change = (packed.decode_now(torch.float32) - before[name].decode_now(torch.float32)).norm()
        gap = (packed.decode_now(torch.float32) - both[name].decode_now(torch.float32)).norm()
        assert gap < 0.02 * change  # sums in another order, then Adam


@pytest.mark.parametrize("fits", [True, False])
def test_two_processes_share_the_dense_model(base: Path, two: Path, fits: bool) -> None:
    """What comes out is the same, whether its hidden states are kept or it is run at every step."""
    script, name = base / f"sharing-{fits}.py", f"shared-{fits}"
    limit = "" if fits else "import reallm.finetuning.teacher as original\noriginal.KEPT_BYTES = 0\n"
    script.write_text(limit + SHARING)
    done = run(
        base / "out", base / "text.txt", base / name, "--steps", "6", program=[str(script)], ACCELERATE_USE_FSDP="true"
    )
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        shares = {tuple(map(int, line.split())) for line in Path(f"{script}-{rank}").read_text().splitlines()}
        assert shares and all(own <= 0.6 * whole for own, whole in shares)
    assert weights_of(base / name) == weights_of(two)


def test_a_loss_that_is_not_finite_in_one_ends_both(base: Path) -> None:
    script = base / "failing.py"
    script.write_text(FAILING)
    done = run(base / "out", base / "text.txt", base / "nan", "--steps", "6", program=[str(script)])
    assert done.returncode == 0, done.stderr
    assert "the loss of step 4 is not finite" in done.stderr
    verify(base / "nan")


def test_what_only_one_process_can_do_is_refused(base: Path) -> None:
    done = run(base / "out", base / "text.txt", base / "blocks", "--order", "blocks")
    assert done.returncode != 0
    assert "reallm: --order blocks: of 2 processes only end-to-end makes use" in done.stderr
    assert not (base / "blocks").exists()
