"""Encoders without an output layer: statistics equal the gradients of whole texts, and predict 1 - cosine."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from encoders import save_sentence_encoder
from safetensors.torch import load_file
from tiny import VOCAB
from torch import Tensor

from reallm.calibration.calibrate import calibrate
from reallm.calibration.objective import make_objective
from reallm.calibration.statistics import statistics_path
from reallm.models.loaded import LoadedModel, load_model

SEED = 3
WINDOWS = torch.randint(5, VOCAB, (3, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(save_sentence_encoder(tmp_path_factory.mktemp("encoder") / "model"))


def with_ends(windows: Tensor) -> Tensor:
    """The windows with <s> and </s> at the ends, written out independently of the calibration."""
    result = windows.clone()
    result[:, 0], result[:, -1] = 0, 2
    return result


def embedding(model: torch.nn.Module, ids: Tensor) -> Tensor:
    mean = model(input_ids=ids[None]).last_hidden_state[0].mean(0)
    return mean / mean.norm()


def test_statistics_are_those_of_the_gradients_of_whole_texts(loaded: LoadedModel, tmp_path: Path) -> None:
    report = calibrate(loaded, WINDOWS, tmp_path, seed=SEED)
    assert report.kept.keys() == {"pooler.dense"}, "the embedding does not depend on the pooler"
    assert report.tokens == WINDOWS.numel()
    actual: dict[str, Tensor] = {}
    for block in (None, 0, 1):
        actual |= load_file(statistics_path(tmp_path, block))
    model, generator = copy.deepcopy(loaded.model).double(), torch.Generator().manual_seed(SEED)
    matrices = [m for m in loaded.matrices if m.name != "pooler.dense"]
    gradients: dict[str, list[Tensor]] = {m.name: [] for m in matrices}
    for ids in with_ends(WINDOWS):
        noise = torch.randn(1, 48, generator=generator)[0].double()
        weights = [model.get_parameter(m.parameter) for m in matrices]
        found = torch.autograd.grad(-(embedding(model, ids) * noise).sum(), weights)
        for matrix, gradient in zip(matrices, found, strict=True):
            gradients[matrix.name].append(gradient)
    for matrix in matrices:
        D = torch.stack(gradients[matrix.name])
        if matrix.kind == "embedding":
            expected = {"lookup": D.square().mean(0)}
        else:
            expected = {
                "guided": torch.einsum("tij,tik->jk", D, D) / matrix.rows / len(D),
                "fisher": D.square().mean(0),
                "gram": torch.einsum("tij,tkj->ik", D, D) / matrix.cols / len(D),
            }
        for kind, value in expected.items():
            # float32 against float64 as in test_calibrate; bf16 rounds each entry of all kinds but guided by 2^-9
            rounding = 0.0 if kind == "guided" else 2.0**-8
            stored = actual[f"{kind}/{matrix.name}"].double()
            assert torch.allclose(stored, value, rtol=rounding, atol=1e-4 * float(value.max())), (kind, matrix.name)
            assert float(value.max()) > 0


def test_the_sampled_loss_predicts_one_minus_cosine(loaded: LoadedModel) -> None:
    """Over labels, the mean of 1/2 (gradient . error)^2 is 1/2 |J error|^2, which is 1 - cosine for a small error."""
    objective = make_objective(loaded, WINDOWS, SEED)
    model = copy.deepcopy(loaded.model).double()
    weight = model.get_parameter("encoder.layer.0.attention.self.value.weight")
    error = 1e-4 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(4)).double()
    ids, generator = objective.inputs[0], torch.Generator().manual_seed(5)
    output = model(input_ids=ids[None])
    predicted = []
    for _ in range(400):
        loss, text_loss, count = objective.losses(output, 0, generator)
        (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
        predicted.append(float((gradient * error).sum()) ** 2 / 2)
    assert (text_loss, count) == (0.0, 0)
    with torch.no_grad():
        before = embedding(model, ids)
        weight += error
        actual = 1 - float(before @ embedding(model, ids))
    # The prediction is 1/2 sigma^2 times a chi-squared variable of one degree, whose deviation over 400 samples is
    # sqrt(2 / 400) = 7% of its mean; the seed is fixed, and three deviations are allowed.
    assert sum(predicted) / len(predicted) == pytest.approx(actual, rel=0.21)
