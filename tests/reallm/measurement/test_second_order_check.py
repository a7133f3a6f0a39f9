"""Predicted losses of a model with extreme outliers are found to be wrong; those of other models are not doubted."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tiny import save_tiny, tiny_model, tiny_tokenizer
from torch import Tensor, nn

from reallm.measurement.calibration_text import sample_windows
from reallm.measurement.encoding import Job
from reallm.measurement.measure import measure
from reallm.measurement.second_order_check import (
    SMALLEST_LOSS,
    CheckedLoss,
    check_second_order,
    doubtful_records,
    warning,
)
from reallm.models.loaded import LoadedModel, load_model
from reallm.planner.tables.measured_table import MeasuredTable
from reallm.planning.plan import plan
from reallm.text.corpus import load_text

SPACE = "linear: [int3-g16, int4-g16, int8-g16]\nembedding: []\nhead: []\n"
OUTLIER = 1e4


Measurement = tuple[MeasuredTable, LoadedModel, Tensor, Job]


def measured(model: Path, work: Path) -> Measurement:
    """A small measurement, and what the check needs beside it."""
    (work / "space.yaml").write_text(SPACE)
    (work / "text.txt").write_text("".join(random.Random(0).choices("abcdefgh ", k=1000)))
    table = measure(
        model, text=work / "text.txt", output=work, space=work / "space.yaml", nsamples=8, seqlen=64, jobs=1
    )
    loaded = load_model(model)
    windows = sample_windows(loaded, load_text(work / "text.txt"), 8, 64, 0, chat_template=False)
    return table, loaded, windows, Job.at(work, str(table.settings["identity"]), 0)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def outliers(work: Path) -> Measurement:
    """A model with one weight of 10,000 in every matrix of its blocks, measured in the folder `work`."""
    folder = work / "model"
    model = tiny_model("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "layers" in name:
                parameter[3, 5] = OUTLIER
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return measured(folder, work)


@pytest.fixture(scope="module", params=["llama", "gpt2", "mixtral", "roberta"])
def ordinary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Measurement:
    """Models with plain and transposed matrices and experts, and an encoder, without outliers."""
    work = tmp_path_factory.mktemp("work")
    return measured(save_tiny(request.param, work / "model"), work)


def test_ordinary_models_are_not_doubted(ordinary: Measurement, monkeypatch: pytest.MonkeyPatch) -> None:
    table, loaded, windows, job = ordinary
    assert doubtful_records(loaded, table.measurements) == [] and table.doubts == ()
    assert "doubts" not in table.model_dump(mode="json")
    monkeypatch.setattr(nn.Module, "__call__", None)  # the model is not even run
    assert check_second_order(loaded, windows, table.measurements, job, {}) == ()


def test_a_matrix_that_the_windows_do_not_run_is_left_out(outliers: Measurement) -> None:
    table, loaded, windows, job = outliers
    unused = check_second_order(loaded, windows, table.measurements, job, {})[0].matrix

    def silence(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    hook = loaded.model.get_submodule(unused).register_forward_hook(silence)
    left = {check.matrix for check in check_second_order(loaded, windows, table.measurements, job, {})}
    hook.remove()
    assert left and unused not in left


def test_outliers_are_found_and_their_loss_is_measured(outliers: Measurement, work: Path) -> None:
    table, loaded, windows, job = outliers
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    checks = check_second_order(loaded, windows, table.measurements, job, {})
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())
    costs = {(record.matrix, record.format): record.two_sided for record in table.measurements}
    assert 1 <= len(checks) <= 4
    assert all(check.predicted == costs[check.matrix, check.format] > SMALLEST_LOSS for check in checks)
    worst = max(checks, key=lambda check: check.predicted)
    assert worst.is_wrong and worst.predicted > 30 * worst.measured > 0
    note = warning(checks)
    assert note is not None and worst.matrix in note and "\n" not in note
    # the table keeps the warning, and plans repeat it
    assert table.doubts == (note,)
    assert note in plan(work, budget="4.5bpw").notes
    assert table.digest() == table.model_copy(update={"doubts": ()}).digest()
    (work / "space.yaml").write_text("linear: [int6-g16]\nembedding: []\nhead: []\n")
    later = measure(
        work / "model",
        text=work / "text.txt",
        output=work,
        space=work / "space.yaml",
        nsamples=8,
        seqlen=64,
        jobs=1,
    )
    assert len(later.doubts) == 1 and len(later.measurements) > len(table.measurements)
    # codes that were not kept are encoded again
    for file in job.cache.folder.rglob("*.safetensors"):
        file.unlink()
    again = check_second_order(loaded, windows, table.measurements, job, {})
    assert [(c.matrix, c.format) for c in again] == [(c.matrix, c.format) for c in checks]
    assert again[0].measured == pytest.approx(checks[0].measured, rel=1e-3)


def test_the_measured_loss_is_near_the_predicted_one_where_second_order_holds(
    ordinary: Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every matrix is checked here, in its middle format. Second order leaves out that errors send tokens to other
    experts, which adds most of mixtral's loss; the others' sums are within a factor of two."""
    table, loaded, windows, job = ordinary
    module = "reallm.measurement.second_order_check"
    monkeypatch.setattr(f"{module}.SMALLEST_LOSS", -1.0)
    monkeypatch.setattr(f"{module}.CHECKED_MATRICES", 1000)
    monkeypatch.setattr(f"{module}.math.log", lambda _: 0.0)
    checks = check_second_order(loaded, windows, table.measurements, job, {})
    assert {check.matrix for check in checks} == {record.matrix for record in table.measurements}
    assert {check.format for check in checks} == {"int4-g16"}
    total = sum(check.measured for check in checks)
    assert 1 / 5 < sum(check.predicted for check in checks) / total < 5


def test_only_large_errors_of_relevant_losses_are_wrong() -> None:
    def wrong(predicted: float, loss: float) -> bool:
        return CheckedLoss("m", "int4-g16", predicted, loss).is_wrong

    assert wrong(4.0, 0.01) and wrong(2e-4, 1e-2) and wrong(1.0, -1e-9)
    assert not wrong(0.5, 0.1) and not wrong(0.1, 0.5) and not wrong(SMALLEST_LOSS / 2, 1e-9)
    assert warning([CheckedLoss("m", "int4-g16", 0.5, 0.1)]) is None
    assert warning([]) is None
