"""Early stops survive an interruption, and `--init plan` adds no factors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import make
from tuning import SEQLEN, StopError, files, linears, write_letters

from reallm.artifacts.verify import read_bytes, read_tensors, verify
from reallm.errors import UserError
from reallm.finetuning import run as run_module
from reallm.finetuning.checkpoints import ENDED_FILE, ProgressCallback, read_end
from reallm.finetuning.distillation import DistillationLoss, DistillationTrainer
from reallm.finetuning.run import finetune
from reallm.kernels.storage.safetensors_reader import StoredTensor
from reallm.planner.tables.plan import read_plan

pytestmark = pytest.mark.usefixtures("one_thread")
RUN = {"seqlen": SEQLEN, "rank": 2, "learning_rate": 3e-3, "kernels": False}
STOPPING = RUN | {"steps": 20, "patience": 2}  # evaluated after 4, 8, ... steps


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_letters(tmp_path_factory.mktemp("text") / "train.txt", 12)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("made"), linears("int3-g16", "nf3-g16+r2i8")).folder


def stop(*_: object, **__: object) -> None:
    raise StopError


@pytest.fixture
def rising(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make every evaluation look worse than the last, so that training stops early; counts the training batches."""
    compute, evaluated, trained = DistillationLoss.forward, [0], [0]

    def forward(self: DistillationLoss, *arguments: Any, **options: Any) -> torch.Tensor:
        evaluated[0] += not self.training
        trained[0] += self.training
        return compute(self, *arguments, **options) + (0 if self.training else evaluated[0])

    monkeypatch.setattr(DistillationLoss, "forward", forward)
    return trained


INTERRUPTIONS = ((DistillationTrainer, "_finalize_training"), (run_module, "write_artifact"))
"""Before the best state is loaded, and before the result is written."""


def test_a_run_that_stopped_early_is_not_continued(
    artifact: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rising: list[int]
) -> None:
    unbroken = files(finetune(artifact, text=text, output=tmp_path / "unbroken", **STOPPING))
    assert rising == [12]
    for owner, name in INTERRUPTIONS:
        output, before = tmp_path / name, rising[0]
        with monkeypatch.context() as patch, pytest.raises(StopError):
            patch.setattr(owner, name, stop)
            finetune(artifact, text=text, output=output, **STOPPING)
        end = read_end(tmp_path / f"{name}.partial")
        assert end is not None and (end.steps, end.best.name) == (12, "checkpoint-4")
        assert rising == [before + 12]
        assert files(finetune(artifact, text=text, output=output, **STOPPING)) == unbroken
        assert rising == [before + 12]


def test_an_end_with_a_damaged_result_is_ignored(
    artifact: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rising: list[int]
) -> None:
    output = tmp_path / "tuned"
    with monkeypatch.context() as patch, pytest.raises(StopError):
        patch.setattr(run_module, "write_artifact", stop)
        finetune(artifact, text=text, output=output, **STOPPING)
    weights = tmp_path / "tuned.partial" / "checkpoint-4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert read_end(tmp_path / "tuned.partial") is None
    finetune(artifact, text=text, output=output, **STOPPING)
    assert rising == [24]  # trained from the start


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"steps": 4}', '{"steps": 4, "best": 4}', '{"steps": 4, "best": ""}']
)
def test_an_unreadable_end_is_ignored(tmp_path: Path, content: str) -> None:
    (tmp_path / ENDED_FILE).write_text(content)
    assert read_end(tmp_path) is None


def test_a_run_cut_off_before_it_stops_has_no_end(
    artifact: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = ProgressCallback.on_save

    def once(self: ProgressCallback, *arguments: Any, **options: Any) -> None:
        saved(self, *arguments, **options)
        raise StopError

    with monkeypatch.context() as patch, pytest.raises(StopError):
        patch.setattr(ProgressCallback, "on_save", once)
        finetune(artifact, text=text, output=tmp_path / "tuned", **STOPPING)
    assert not (tmp_path / "tuned.partial" / ENDED_FILE).exists()


def bytes_of(tensor: StoredTensor) -> bytes:
    return read_bytes(tensor).tobytes()


def test_init_plan_trains_the_factors_of_the_plan_and_adds_none(artifact: Path, text: str, tmp_path: Path) -> None:
    tuned = finetune(
        artifact, text=text, output=tmp_path / "tuned", train=("factors",), init="plan", **RUN | {"steps": 6}
    )
    assert verify(tuned).deep
    old, new, before, after = read_plan(artifact), read_plan(tuned), read_tensors(artifact), read_tensors(tuned)
    assert [c.format for c in new.choices] == [c.format for c in old.choices] and new.file_bytes == old.file_bytes
    changed = {name for name in after if bytes_of(before[name]) != bytes_of(after[name])}
    fields = ("left", "right", "left_scales", "right_scales")
    with_factors = {c.matrix for c in old.choices if "+r2i8" in c.format}
    assert {name.rpartition(".")[0] for name in changed} == with_factors
    assert {name.rpartition(".")[2] for name in changed} <= set(fields)


def test_init_plan_without_factors_in_the_plan_has_nothing_to_train(text: str, tmp_path: Path) -> None:
    bare = make("llama", tmp_path / "bare", linears("int3-g16")).folder
    with pytest.raises(UserError, match="--train factors: the artifact has none of these parts"):
        finetune(bare, text=text, output=tmp_path / "tuned", train=("factors",), init="plan", **RUN | {"steps": 6})
