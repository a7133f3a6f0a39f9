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
from reallm.finetuning import finetune
from reallm.runtime.replace import packed_modules
from reallm.verification import read_plan, verify

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


def run(
    artifact: Path, text: Path, output: Path, *options: str, program: Sequence[str] = ("-m", "reallm")
) -> subprocess.CompletedProcess[str]:
    """`reallm finetune` in two processes."""
    root = str(Path(reallm.__file__).parents[1])
    given = ["--text", str(text), "-o", str(output), "--seqlen", str(SEQLEN), "--no-kernels", "--patience", "0"]
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program, "finetune"]
    return subprocess.run(
        [sys.executable, "-m", *launch, str(artifact), *given, *options],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    pack("llama", folder, linears("int2-g16", "tq2-l8+ldl+rot"))
    write_letters(folder / "text.txt", 40)
    return folder


def test_two_processes_train_as_one_with_twice_the_batch(base: Path) -> None:
    done = run(base / "out", base / "text.txt", base / "two", "--steps", "6")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("wrote ") == 1 and not (base / "two.partial").exists()
    verify(base / "two")
    options = {"steps": 6, "batch_size": 2, "seqlen": SEQLEN, "patience": 0, "kernels": False}
    one = finetune(base / "out", text=str(base / "text.txt"), output=base / "one", **options)
    assert read_plan(one).file_bytes == read_plan(base / "two").file_bytes
    before, alone, both = (dict(packed_modules(reallm.load(base / name)[0])) for name in ("out", "one", "two"))
    for name, packed in alone.items():
        change = (packed.decode_now(torch.float32) - before[name].decode_now(torch.float32)).norm()
        gap = (packed.decode_now(torch.float32) - both[name].decode_now(torch.float32)).norm()
        assert gap < 0.02 * change  # sums in another order, then Adam


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
