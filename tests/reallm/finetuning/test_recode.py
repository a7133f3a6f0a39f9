"""New codes: the old ones without training, better ones of the same size with it, resumed to the byte."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny
from tuning import SEQLEN, StopError, files, kl

from reallm.artifacts.verify import read_bytes, read_tensors, verify
from reallm.compilation.compile import compile_plan
from reallm.errors import UserError
from reallm.finetuning import recode as recode_module
from reallm.finetuning import resolved_settings
from reallm.finetuning.block_encoder import BlockEncoder
from reallm.finetuning.partly_encoded import PartlyEncodedModel
from reallm.finetuning.processes import SINGLE_PROCESS
from reallm.finetuning.recode import recode
from reallm.finetuning.resolved_settings import ResolvedSettings
from reallm.finetuning.run import finetune
from reallm.finetuning.student_teacher import StudentTeacher, open_student, open_training_data
from reallm.finetuning.trainable_parts import TrainableParts
from reallm.measurement.measure import measure
from reallm.planner.tables.measured_table import TABLE_FILE
from reallm.planner.tables.plan import read_plan
from reallm.planning.plan import plan
from reallm.runtime.install import packed_tensors
from reallm.text.corpus import load_text

pytestmark = pytest.mark.usefixtures("one_thread")
SPACE = """
linear: [tq2-l8+ldl2+rot, int2-g16+ldl, aq1x4-d4-shared]
embedding: [int4-g16]
expert: [int2-g16+ldl, int4-g16]
"""
RUN: dict[str, Any] = {
    "stages": ("codes",),
    "code_steps": 12,
    "code_learning_rate": 5e-4,
    "seqlen": SEQLEN,
    "rank": 0,
    "train": ("scales", "norms"),
    "steps": 8,
    "gain_learning_rate": 5e-3,
    "patience": 0,
    "kernels": False,
}


def made(architecture: str, base: Path, text: str, budget: str) -> Path:
    """An artifact with its work folder beside it: base/out, base/work, base/model."""
    save_tiny(architecture, base / "model")
    (base / "space.yaml").write_text(SPACE)
    options: dict[str, Any] = {"nsamples": 4, "seqlen": 64, "jobs": 1}
    measure(base / "model", text=text, output=base / "work", space=base / "space.yaml", **options)
    plan(base / "work", budget=budget, output=base / "plan.json")
    return compile_plan(base / "plan.json", base / "out", kernels=False)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    return made("llama", tmp_path_factory.mktemp("llama"), text, "3bpw")


@pytest.fixture(scope="module")
def tuned(llama: Path, text: str) -> Path:
    return finetune(llama, text=text, output=llama.parent / "tuned", **RUN)


def opened(artifact: Path, text: str, **change: Any) -> tuple[StudentTeacher, ResolvedSettings]:
    settings = ResolvedSettings(**RUN | {"steps": 60} | change)
    data = open_training_data(artifact, read_plan(artifact), load_text(text), settings, SINGLE_PROCESS)
    return open_student(artifact, data, settings), settings


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3_moe", "gpt2"])
def test_without_a_step_the_codes_are_the_old_ones(architecture: str, text: str, tmp_path: Path) -> None:
    artifact = made(architecture, tmp_path, text, "6bpw")
    pair, settings = opened(artifact, text, code_steps=0)
    before = {name: raw.clone() for name, raw in packed_tensors(pair.student).items()}
    recode(pair, tmp_path / "work", settings, tmp_path, math.inf)
    after = packed_tensors(pair.student)
    assert before.keys() == after.keys() and len(before) > 7
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_new_codes_that_do_not_help_are_put_back(llama: Path, text: str, tmp_path: Path) -> None:
    pair, settings = opened(llama, text)
    before = {name: raw.clone() for name, raw in packed_tensors(pair.student).items()}
    norms = {name: value.clone() for name, value in pair.student.named_parameters() if "norm" in name}
    assert recode(pair, llama.parent / "work", settings, tmp_path, 1e-9) == 1e-9
    assert all(torch.equal(raw, before[name]) for name, raw in packed_tensors(pair.student).items())
    assert all(torch.equal(pair.student.get_parameter(name), value) for name, value in norms.items())
    assert recode(pair, llama.parent / "work", settings, tmp_path, math.inf) < math.inf  # from the saved state
    assert any(not torch.equal(raw, before[name]) for name, raw in packed_tensors(pair.student).items())


def test_the_encoded_model_equals_the_compressed_one(llama: Path, text: str, tmp_path: Path) -> None:
    pair, settings = opened(llama, text)
    encoder = BlockEncoder(pair, llama.parent / "work")
    model = PartlyEncodedModel(pair, encoder, settings)
    for index, number in enumerate(encoder.blocks):
        model.encode_and_freeze(number)
        model.train(index)
    model.store_norms()
    ids = pair.held_out.tokens[:1]
    with torch.no_grad():
        torch.testing.assert_close(model.model(input_ids=ids).logits, pair.student(input_ids=ids).logits)
        assert not torch.allclose(model.model(input_ids=ids).logits, pair.dense.model(input_ids=ids).logits)


def test_new_codes_lower_the_loss_at_the_same_size(llama: Path, tuned: Path, text: str) -> None:
    assert verify(tuned).deep
    old, new, before, after = read_plan(llama), read_plan(tuned), read_tensors(llama), read_tensors(tuned)
    assert kl(tuned, llama.parent / "model", text) < 0.9 * kl(llama, llama.parent / "model", text)
    assert (new.file_bytes, [c.format for c in new.choices]) == (old.file_bytes, [c.format for c in old.choices])
    changed = {n.rpartition(".")[2] for n in after if read_bytes(before[n]).tobytes() != read_bytes(after[n]).tobytes()}
    assert "codes" in changed and "codebooks" not in changed
    assert any("by new codes, 12 steps after each block" in note for note in new.notes)


def test_then_scales_and_norms(llama: Path, tuned: Path, text: str, tmp_path: Path) -> None:
    both = RUN | {"stages": ("codes", "end-to-end"), "gain_learning_rate": None}
    output = finetune(llama, text=text, output=tmp_path / "both", **both)
    assert verify(output).deep
    assert kl(output, llama.parent / "model", text) < kl(tuned, llama.parent / "model", text)


def test_recomputed_activations_change_no_byte(llama: Path, tuned: Path, text: str, tmp_path: Path) -> None:
    output = finetune(llama, text=text, output=tmp_path / "tuned", **RUN, gradient_checkpointing=True)
    assert files(output) == files(tuned)


@pytest.mark.parametrize("saves", [1, 5])
def test_an_interrupted_run_ends_in_the_same_bytes(
    llama: Path, tuned: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: int
) -> None:
    monkeypatch.setattr(recode_module, "SAVES", saves)
    encode, calls = PartlyEncodedModel.encode_and_freeze, [0]

    def stopping(self: PartlyEncodedModel, block: int) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise StopError
        encode(self, block)

    with monkeypatch.context() as patch, pytest.raises(StopError):
        patch.setattr(PartlyEncodedModel, "encode_and_freeze", stopping)
        finetune(llama, text=text, output=tmp_path / "tuned", **RUN)
    assert (tmp_path / "tuned.partial" / recode_module.STATE_FILE).exists() == (saves == 5)
    assert files(finetune(llama, text=text, output=tmp_path / "tuned", **RUN)) == files(tuned)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": ("blocks", "codes")}, "--stages blocks,codes: new codes would undo the earlier training"),
        (
            {"stages": ("codes", "end-to-end"), "loss": "text"},
            "--stages codes trains the model to match the dense model: it needs --loss kl",
        ),
        ({"adapter": True}, "--stages codes makes new codes, which an --adapter cannot hold"),
        ({"work": "gone"}, "gone"),
        ({"code_steps": -1}, "--code-steps -1"),
        ({"code_learning_rate": 0.0}, "--code-learning-rate 0.0"),
        ({"code_learning_rate": 0.99, "code_steps": 50}, "nothing is written"),
    ],
)
def test_mistakes(llama: Path, text: str, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises((UserError, ValueError), match=message):
        finetune(llama, text=text, output=tmp_path / "tuned", **RUN | change)
    assert not (tmp_path / "tuned").exists()
    assert (
        not (tmp_path / "tuned.partial").exists() or "code_learning_rate" in change
    )  # refused before anything is made


@pytest.mark.parametrize(
    ("fault", "message"),
    [("other", "was measured on another model"), ("emptied", r"block-0001\.safetensors.* measure")],
)
def test_a_measured_folder_that_does_not_fit_is_refused(
    llama: Path, text: str, tmp_path: Path, fault: str, message: str
) -> None:
    work = shutil.copytree(llama.parent / "work", tmp_path / "work")
    if fault == "other":
        table = json.loads((work / TABLE_FILE).read_text())
        (work / TABLE_FILE).write_text(json.dumps(table | {"model_sha256": "0" * 64}))
    else:
        next(work.glob("statistics/*/block-0001.safetensors")).unlink()
    with pytest.raises(UserError, match=message):
        finetune(llama, text=text, output=tmp_path / "tuned", **RUN, work=work)
    assert not (tmp_path / "tuned").exists()


@pytest.mark.parametrize(("threshold", "steps"), [(math.inf, 60), (0.0, 160)])
def test_a_plan_that_is_predicted_to_lose_more_is_trained_longer(
    llama: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threshold: float, steps: int
) -> None:
    seen = []

    def stopping(pair: StudentTeacher, parts: TrainableParts, settings: ResolvedSettings, *_: object) -> None:
        seen.append((settings.stages, settings.steps))
        raise StopError

    monkeypatch.setattr(resolved_settings, "MORE_STEPS_FROM", threshold)
    monkeypatch.setattr("reallm.finetuning.run.run_stages", stopping)
    assert resolved_settings.default_steps(read_plan(llama).model_copy(update={"cost": "relative"})) == 60
    with pytest.raises(StopError):
        finetune(llama, text=text, output=tmp_path / "tuned", seqlen=SEQLEN)
    assert seen == [(("end-to-end",), steps)]


def test_weights_of_a_bfloat16_model_are_trained_in_float32(
    llama: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reallm.finetuning.student_teacher.compute_dtype", lambda model_dtype, device: torch.bfloat16)
    pair, settings = opened(llama, text, code_learning_rate=1e-4)
    assert pair.dense.model.dtype == torch.bfloat16
    model = PartlyEncodedModel(pair, BlockEncoder(pair, llama.parent / "work"), settings)
    before = {name: value.detach().clone() for name, value in model.trained.items()}
    model.train(0)
    moved = [(value != before[name]).float().mean() for name, value in model.trained.items() if value.ndim == 2]
    assert all(value.dtype == torch.float32 for value in model.trained.values())
    assert min(map(float, moved)) > 0.9
