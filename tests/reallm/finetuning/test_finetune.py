"""Fine-tuning of tiny models lowers the loss, resumes to the byte, and is refused where it cannot or does not help."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import mixed
from tiny import save_tiny
from tuning import SEQLEN, StopError, files, kl, linears, pack
from typer.testing import CliRunner

from reallm.artifacts.verify import read_bytes, read_tensors, verify
from reallm.cli.main import app
from reallm.errors import UserError
from reallm.finetuning import run as run_module
from reallm.finetuning import teacher as teacher_module
from reallm.finetuning.checkpoints import COMPLETE_FILE
from reallm.finetuning.distillation import DistillationLoss, DistillationTrainer, training_order
from reallm.finetuning.processes import SINGLE_PROCESS
from reallm.finetuning.resolved_settings import ResolvedSettings
from reallm.finetuning.run import finetune
from reallm.finetuning.settings import PARTS
from reallm.finetuning.stages import RunFolders, run_stages
from reallm.finetuning.student_teacher import open_student, open_training_data
from reallm.finetuning.trainable_parts import TrainableParts
from reallm.models.loaded import load_model
from reallm.planner.tables.plan import read_plan
from reallm.runtime.install import packed_modules
from reallm.text.corpus import load_text

pytestmark = pytest.mark.usefixtures("one_thread")
RUN = {
    "steps": 12,
    "batch_size": 2,
    "seqlen": SEQLEN,
    "rank": 4,
    "learning_rate": 3e-3,
    "gain_learning_rate": 5e-3,
    "patience": 0,
    "kernels": False,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack("llama", tmp_path_factory.mktemp("llama"), linears("int2-g16", "nf2-g0+r2i8", "int2-g16+ldl"))


@pytest.fixture(scope="module")
def tuned(llama: Path, text: str) -> Path:
    return finetune(llama, text=text, output=llama.parent / "tuned", **RUN)


@pytest.fixture(scope="module")
def divergence_before(llama: Path, text: str) -> float:
    return kl(llama, llama.parent / "model", text)


def stop_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """Make the training stop in the middle of batch `batches` + 1."""
    compute, left = DistillationTrainer.compute_loss, [batches]

    def stopping(self: DistillationTrainer, model: torch.nn.Module, *arguments: Any, **options: Any) -> Any:
        left[0] -= model.training
        if left[0] < 0:
            raise StopError
        return compute(self, model, *arguments, **options)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", stopping)


def test_the_divergence_from_the_dense_model_falls(
    llama: Path, tuned: Path, text: str, divergence_before: float
) -> None:
    assert verify(tuned).deep
    assert (
        kl(tuned, llama.parent / "model", text) < 0.8 * divergence_before
    )  # measured: 0.44 of it; new factors alone give 0.66
    assert not (tuned.parent / "tuned.partial").exists()


def test_training_lowers_the_divergence_beyond_that_of_new_factors(llama: Path, text: str, tmp_path: Path) -> None:
    settings = ResolvedSettings(rank=4, steps=12, batch_size=2, seqlen=SEQLEN, learning_rate=3e-3)
    data = open_training_data(llama, read_plan(llama), load_text(text), settings, SINGLE_PROCESS)
    pair = open_student(llama, data, settings)
    parts = TrainableParts(pair.student, pair.linears, PARTS[:3], settings.new_factors, pair.dense.dtype)
    gain = run_stages(pair, parts, settings, RunFolders(tmp_path, tmp_path))
    assert gain.trained < 0.95 * gain.started < 0.95 * gain.before
    assert pair.held_out_loss() == gain.trained  # the trained factors are those in the model


def test_the_dense_model_is_not_in_memory_while_it_is_not_needed(
    llama: Path, tuned: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are freed for training and read again for the artifact, if its states fit into the cache."""
    compute, seen = DistillationTrainer.compute_loss, []

    def watching(self: DistillationTrainer, *arguments: Any, **options: Any) -> Any:
        seen.append(sum(p.numel() for p in self.distillation_loss.objective.teacher.runner.parameters()))
        return compute(self, *arguments, **options)

    def loading(*arguments: Any, **options: Any) -> Any:
        dense = arguments[1].teacher.runner
        seen.append(sum(p.numel() for p in dense.parameters()))
        return opening(*arguments, **options)

    opening = run_module.open_student
    monkeypatch.setattr(run_module, "open_student", loading)  # already before the compressed model is loaded
    monkeypatch.setattr(DistillationTrainer, "compute_loss", watching)
    whole = load_model(llama.parent / "model").model
    head = whole.get_output_embeddings().weight.numel()
    assert files(finetune(llama, text=text, output=tmp_path / "freed", **RUN)) == files(tuned)
    assert set(seen) == {head}
    seen.clear()
    monkeypatch.setattr(teacher_module, "CACHE_BYTES", 1)
    assert files(finetune(llama, text=text, output=tmp_path / "kept", **RUN)) == files(tuned)
    assert set(seen) == {sum(p.numel() for p in whole.parameters())}


def test_formats_bytes_and_codes_of_the_new_plan(llama: Path, tuned: Path) -> None:
    old, new, before, after = read_plan(llama), read_plan(tuned), read_tensors(llama), read_tensors(tuned)
    assert new.file_bytes == sum(path.stat().st_size for path in tuned.glob("*.safetensors"))
    for was, now in zip(old.choices, new.choices, strict=True):
        added = "" if "+r2i8" in was.format else "+r4i8"
        assert (now.format, now.cost) == (was.format + added, was.cost)
        stored = [t for name, t in after.items() if name.rpartition(".")[0] == now.matrix]
        assert sum(t.stop - t.start for t in stored) == now.nbytes
        codes = f"{now.matrix}.codes"
        assert read_bytes(before[codes]).tobytes() == read_bytes(after[codes]).tobytes()
    assert any("trained for 12 steps" in note for note in new.notes)
    assert "held-out windows" in (tuned / "README.md").read_text()


@pytest.mark.parametrize("fmt", ["tq2-l8+ldl+rot", "int2-g16", "nf2-g16-dq4x16"])
def test_scales_and_norms_do_not_change_the_size(fmt: str, text: str, tmp_path: Path) -> None:
    artifact = pack("llama", tmp_path, linears(fmt))
    parts = ("scales", "norms")
    tuned = finetune(artifact, text=text, output=tmp_path / "tuned", **RUN | {"train": parts, "rank": 0})
    old, new, before, after = read_plan(artifact), read_plan(tuned), read_tensors(artifact), read_tensors(tuned)
    assert verify(tuned).deep
    assert (new.file_bytes, new.budget, new.bits_per_weight) == (old.file_bytes, old.budget, old.bits_per_weight)
    assert [c.format for c in new.choices] == [c.format for c in old.choices]
    changed = {name.rpartition(".")[2] for name in after if bytes_of(before[name]) != bytes_of(after[name])}
    assert changed == ({"weight"} if "dq" in fmt else {"weight", "scales"})  # the weights of norms, but no codes
    assert kl(tuned, tmp_path / "model", text) < 0.95 * kl(artifact, tmp_path / "model", text)
    again = finetune(
        tuned, text=text, output=tmp_path / "again", **RUN | {"train": ("factors",), "rank": 1, "steps": 4}
    )
    norms = [name for name in after if name.endswith("norm.weight")]
    assert norms and all(bytes_of(after[n]) == bytes_of(read_tensors(again)[n]) for n in norms)  # they are kept


def bytes_of(tensor: Any) -> bytes:
    return read_bytes(tensor).tobytes()


def test_norms_that_are_one_plus_their_weight_are_trained_too(text: str, tmp_path: Path) -> None:
    artifact = pack("gemma2", tmp_path, linears("int3-g16"))
    tuned = finetune(artifact, text=text, output=tmp_path / "tuned", **RUN | {"train": ("norms",), "rank": 0})
    assert kl(tuned, tmp_path / "model", text) < kl(artifact, tmp_path / "model", text)


def test_without_rank_there_may_be_no_factors_to_train(text: str, tmp_path: Path) -> None:
    artifact = pack("llama", tmp_path, linears("int2-g16"))
    with pytest.raises(UserError, match="--train factors: the artifact has none of these parts; give --rank 8"):
        finetune(artifact, text=text, output=tmp_path / "tuned", **RUN | {"train": ("factors",), "rank": 0})


def test_tuned_again_it_keeps_its_size(tuned: Path, text: str, tmp_path: Path) -> None:
    again = finetune(tuned, text=text, output=tmp_path / "again", **RUN | {"learning_rate": 1e-3})
    assert [c.format for c in read_plan(again).choices] == [c.format for c in read_plan(tuned).choices]
    assert read_plan(again).file_bytes == read_plan(tuned).file_bytes
    assert kl(again, tuned.parent / "model", text) < kl(tuned, tuned.parent / "model", text)


@pytest.mark.parametrize("batches", [1, 7])
def test_an_interrupted_run_ends_in_the_same_bytes(
    llama: Path, tuned: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: int
) -> None:
    output = tmp_path / "tuned"
    with monkeypatch.context() as patch, pytest.raises(StopError):
        stop_after(patch, batches)
        finetune(llama, text=text, output=output, **RUN)
    checkpoints = {path.name for path in (tmp_path / "tuned.partial").glob("checkpoint-*")}  # the best and the last
    assert ("checkpoint-6" in checkpoints) == (batches == 7) and not output.exists()
    with monkeypatch.context() as patch:
        stop_after(patch, 12 - 6 if checkpoints else 12)  # it would stop if it trained any batch again
        finetune(llama, text=text, output=output, **RUN)
    assert files(output) == files(tuned) and not (tmp_path / "tuned.partial").exists()


def test_a_checkpoint_cut_off_is_not_read(
    llama: Path, tuned: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "tuned"
    with monkeypatch.context() as patch, pytest.raises(StopError):
        stop_after(patch, 7)
        finetune(llama, text=text, output=output, **RUN)
    last = tmp_path / "tuned.partial" / "checkpoint-6"
    state = last / "optimizer.pt"
    state.write_bytes(state.read_bytes()[:-100])
    assert (last / COMPLETE_FILE).exists()
    finetune(llama, text=text, output=output, **RUN)
    assert files(output) == files(tuned)


def test_stopped_while_writing_it_does_not_train_again(
    llama: Path, tuned: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise StopError

    with monkeypatch.context() as patch, pytest.raises(StopError):
        patch.setattr(run_module, "write_artifact", full)
        finetune(llama, text=text, output=tmp_path / "tuned", **RUN)
    stop_after(monkeypatch, 0)
    assert files(finetune(llama, text=text, output=tmp_path / "tuned", **RUN)) == files(tuned)


def test_a_full_disk_loses_nothing(
    llama: Path, tuned: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, left = torch.save, [10]  # four calls a checkpoint: it fails in the middle of the third

    def failing(value: object, file: Any, **options: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
        save(value, file, **options)

    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=r"tuned\.partial: a checkpoint cannot be written"),
    ):
        patch.setattr(torch, "save", failing)
        finetune(llama, text=text, output=tmp_path / "tuned", **RUN)
    assert (tmp_path / "tuned.partial" / "checkpoint-6").exists()
    stop_after(monkeypatch, 12 - 4)
    assert files(finetune(llama, text=text, output=tmp_path / "tuned", **RUN)) == files(tuned)


@pytest.mark.parametrize("change", [{"seed": 1}, {"resume": False}])
def test_another_run_starts_from_the_beginning(
    llama: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Mapping[str, Any]
) -> None:
    run = RUN | {"steps": 2}
    with monkeypatch.context() as patch, pytest.raises(StopError):
        stop_after(patch, 1)
        finetune(llama, text=text, output=tmp_path / "tuned", **run)
    with monkeypatch.context() as patch, pytest.raises(StopError):
        stop_after(patch, 3)
        finetune(llama, text=text, output=tmp_path / "tuned", **run | change | {"batch_size": 4, "steps": 9})
    checkpoints = sorted(path.name for path in (tmp_path / "tuned.partial").glob("checkpoint-*"))
    assert checkpoints[-1] == "checkpoint-3" and "checkpoint-1" not in checkpoints


def test_gradient_checkpointing_gives_the_same_factors(
    llama: Path, tuned: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no decoded weight of the compressed model outlives its product."""
    compute, decoded_sizes = DistillationTrainer.compute_loss, []

    def watching(self: DistillationTrainer, *arguments: Any, **options: Any) -> Any:
        loss = compute(self, *arguments, **options)
        for _, packed in packed_modules(self.distillation_loss.objective.model):
            products = [] if packed.training_part is None else vars(packed.training_part.scaled_product).values()
            held = [value for value in (packed.decoded, *products) if isinstance(value, torch.Tensor)]
            decoded_sizes.append(sum(value.numel() for value in held))
        return loss

    monkeypatch.setattr(DistillationTrainer, "compute_loss", watching)
    output = finetune(llama, text=text, output=tmp_path / "tuned", gradient_checkpointing=True, **RUN)
    assert files(output) == files(tuned)  # the same operations, done twice
    assert decoded_sizes and not any(decoded_sizes)


@pytest.mark.parametrize("architecture", ["gpt2", "roberta", "gemma2", "qwen3_moe"])
def test_other_architectures(architecture: str, text: str, tmp_path: Path) -> None:
    """Transposed weights; masked tokens; a packed tied embedding, shared codebooks; experts, which are not trained."""
    kinds = ("linear", "embedding", "expert") if architecture in ("gemma2", "qwen3_moe") else ("linear",)
    make = mixed(kinds) if architecture == "gemma2" else lambda m: "int2-g16" if m.kind in kinds else None
    artifact = pack(architecture, tmp_path, make)
    output = finetune(artifact, text=text, output=tmp_path / "tuned", **RUN | {"steps": 4})
    verify(output)
    assert kl(output, tmp_path / "model", text) < kl(artifact, tmp_path / "model", text)
    assert {c.matrix for c in read_plan(output).choices if "+r" in c.format} >= {
        c.matrix for c in read_plan(artifact).choices if c.kind == "linear"
    }


def test_training_that_does_not_help_leaves_the_new_factors_untrained(
    llama: Path, text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, divergence_before: float
) -> None:
    with caplog.at_level(logging.WARNING, "reallm"):
        output = finetune(llama, text=text, output=tmp_path / "tuned", **RUN | {"learning_rate": 0.9})
    assert "training did not help" in caplog.text
    assert any("training did not lower" in note for note in read_plan(output).notes)
    verify(output)
    assert kl(output, llama.parent / "model", text) < divergence_before


def test_training_ends_when_it_no_longer_helps(
    llama: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every evaluation looks worse than the one before: the two after the first end the run, and the first is kept."""
    compute, calls = DistillationLoss.forward, [0]

    def rising(self: DistillationLoss, *arguments: Any, **options: Any) -> torch.Tensor:
        calls[0] += not self.training
        return compute(self, *arguments, **options) + (0 if self.training else calls[0])

    monkeypatch.setattr(DistillationLoss, "forward", rising)
    run = RUN | {"steps": 40, "patience": 2}
    output = finetune(llama, text=text, output=tmp_path / "tuned", **run)
    assert any("trained for 24 steps" in note for note in read_plan(output).notes)  # evaluated after 8, 16 and 24


@pytest.mark.parametrize("bad_step", [1, 9])
def test_a_loss_that_is_not_finite_ends_training_with_the_last_good_state(
    llama: Path,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    divergence_before: float,
    bad_step: int,
) -> None:
    compute, left = DistillationLoss.forward, [bad_step]

    def failing(self: DistillationLoss, *arguments: Any, **options: Any) -> torch.Tensor:
        left[0] -= self.training
        loss = compute(self, *arguments, **options)
        return loss * torch.nan if self.training and left[0] == 0 else loss

    monkeypatch.setattr(DistillationLoss, "forward", failing)
    with caplog.at_level(logging.WARNING, "reallm"):
        output = finetune(llama, text=text, output=tmp_path / "tuned", **RUN)
    where = "the state before that step" if bad_step == 1 else "checkpoint-"
    assert f"the loss of step {bad_step} is not finite" in caplog.text and where in caplog.text
    assert kl(output, llama.parent / "model", text) < divergence_before


def test_without_any_gain_nothing_is_written(tuned: Path, text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing is written.*--learning-rate"):
        finetune(tuned, text=text, output=tmp_path / "again", **RUN | {"learning_rate": 0.9})
    assert not list(tmp_path.iterdir())


def test_mistakes_are_refused_before_anything_is_written(llama: Path, text: str, tmp_path: Path) -> None:
    other = save_tiny("llama", tmp_path / "other", seed=5)
    short = tmp_path / "short.txt"
    short.write_text("a" * (2 * SEQLEN - 1))
    output = tmp_path / "tuned"
    cases: list[tuple[Mapping[str, Any], str]] = [
        ({"teacher": tmp_path / "gone"}, "gone does not exist"),
        ({"teacher": other}, "was made for another model than .*other; name the right one with --teacher"),
        ({"text": str(short)}, "short.txt has only one window of 32 tokens"),
        ({"text": str(tmp_path / "no.txt")}, "no.txt does not exist"),
        ({"seqlen": 4096}, "--seqlen 4096: this model takes 1 to 256"),
        ({"rank": -1}, "--rank -1: expected 0 to 1024"),
        ({"train": ("factors", "biases")}, "--train biases: expected factors, scales, norms, codebooks, embeddings"),
        ({"train": ()}, "--train names nothing to train"),
        ({"factor_dtype": "f8"}, "--factor-dtype f8: expected f16, i8 or i4"),
        ({"steps": 0}, "--steps 0"),
        ({"learning_rate": 0.0}, "--learning-rate 0.0"),
        ({"gain_learning_rate": 1.0}, "--gain-learning-rate 1.0"),
        ({"patience": -1}, "--patience -1: expected at least 0 evaluations"),
        ({"loss": "mse"}, "--loss mse: expected kl or text"),
        ({"device": "tpu"}, "--device tpu: expected cpu"),
        ({"output": other}, "other exists and is no"),
        ({"output": llama}, "exists; give another name, or --force"),
    ]
    for change, message in cases:
        with pytest.raises(UserError, match=message):
            finetune(llama, **{"text": text, "output": output} | RUN | change)
    with pytest.raises(UserError, match="not a reallm artifact"):
        finetune(other, text=text, output=output, **RUN)
    assert not output.exists() and not (tmp_path / "tuned.partial").exists()


def test_the_command_does_the_same_and_reports_a_mistake_in_one_line(
    llama: Path, tuned: Path, text: str, tmp_path: Path
) -> None:
    options = ["--text", text, "-o", str(tmp_path / "tuned"), "--no-kernels"]
    for name in ("steps", "batch_size", "seqlen", "rank", "learning_rate", "gain_learning_rate", "patience"):
        options += [f"--{name.replace('_', '-')}", str(RUN[name])]
    done = CliRunner().invoke(app, ["finetune", str(llama), *options])
    assert done.exit_code == 0, done.output
    assert files(tmp_path / "tuned") == files(tuned)
    refused = CliRunner().invoke(app, ["finetune", str(llama), *options])
    assert refused.exit_code == 2
    assert [line for line in refused.stderr.splitlines() if line.startswith("reallm: ")] == [
        f"reallm: {tmp_path / 'tuned'} exists; give another name, or --force to replace it"
    ]


def test_a_folder_that_is_not_a_run_is_left_alone(llama: Path, text: str, tmp_path: Path) -> None:
    stranger = tmp_path / "tuned.partial" / "thesis.txt"
    stranger.parent.mkdir()
    stranger.write_text("mine")
    with pytest.raises(UserError, match=r"tuned\.partial exists but is not an interrupted run"):
        finetune(llama, text=text, output=tmp_path / "tuned", **RUN)
    assert stranger.read_text() == "mine"


def test_an_artifact_without_compressed_linears_is_refused(text: str, tmp_path: Path) -> None:
    artifact = pack("llama", tmp_path, lambda matrix: "int4-g16" if matrix.kind == "embedding" else None)
    with pytest.raises(UserError, match="no compressed linear"):
        finetune(artifact, text=text, output=tmp_path / "tuned", **RUN)
    assert not (tmp_path / "tuned.partial").exists()


def test_a_damaged_artifact_is_refused_before_anything_is_written(text: str, tmp_path: Path) -> None:
    artifact = pack("llama", tmp_path, linears("int4-g16"))
    weights = artifact / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"model\.safetensors"):
        finetune(artifact, text=text, output=tmp_path / "tuned", **RUN)
    assert not (tmp_path / "tuned.partial").exists()


def test_the_learning_rate_of_scales_follows_the_divergence() -> None:
    kl, fixed = ResolvedSettings(), ResolvedSettings(gain_learning_rate=2e-3)
    assert [kl.gain_rate(nats) for nats in (6.0, 0.6, 0.15, 0.0)] == [5e-3, 5e-3, 0.15 / 120, 5e-5]
    assert fixed.gain_rate(0.15) == 2e-3 and ResolvedSettings(loss="text").gain_rate(3.0) == 5e-3


@pytest.mark.parametrize(("count", "needed"), [(5, 3), (5, 5), (3, 10), (1, 4)])
def test_every_window_is_seen_before_any_is_seen_again(count: int, needed: int) -> None:
    order = training_order(count, needed, seed=3).tolist()
    assert len(order) == needed
    for start in range(0, needed, count):
        part = order[start : start + count]
        assert len(set(part)) == len(part) and set(part) <= set(range(count))
    assert order == training_order(count, needed, seed=3).tolist()
