"""Two processes with a window each train as one process with both."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tuning import SEQLEN, linears, pack

import reallm
from reallm.finetuning import finetune
from reallm.runtime.replace import packed_modules
from reallm.verification import read_plan, verify


def run(artifact: Path, text: Path, output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`reallm finetune` in two processes."""
    root = str(Path(reallm.__file__).parents[1])
    given = ["--text", str(text), "-o", str(output), "--seqlen", str(SEQLEN), "--no-kernels", "--patience", "0"]
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "reallm", "finetune"]
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
    (folder / "text.txt").write_text("".join(random.Random(1).choices("abcdefgh .", k=40 * SEQLEN)), encoding="utf-8")
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


def test_what_only_one_process_can_do_is_refused(base: Path) -> None:
    done = run(base / "out", base / "text.txt", base / "blocks", "--order", "blocks")
    assert done.returncode != 0
    assert "reallm: --order blocks: of 2 processes only end-to-end makes use" in done.stderr
    assert not (base / "blocks").exists()
