"""Calibration on a compressed prefix: the inputs come from the artifact, and the model itself is left as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from artifacts import Made, make
from tiny import VOCAB

from reallm.calibration.calibrate import calibrate
from reallm.calibration.statistics import read_statistics
from reallm.errors import UserError
from reallm.measurement.compressed_prefix import prefix_digest, prefix_weights
from reallm.models.loaded import LoadedModel, load_model

WINDOWS = torch.randint(5, VOCAB, (2, 24), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module", params=["llama", "mixtral", "gpt2"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(request.param, tmp_path_factory.mktemp(request.param))


def second_moments(loaded: LoadedModel, folder: Path, prefix: Path | None) -> dict[str, torch.Tensor]:
    calibrate(loaded, WINDOWS, folder, seed=1, weights=None if prefix is None else prefix_weights(prefix, loaded))
    moments = {}
    for block in range(len(loaded.blocks)):
        members = [m for m in loaded.matrices if m.block == block and m.kind == "linear"]
        moments |= read_statistics(folder, block, members).guided
    return moments


def test_the_artifacts_weights_replace_the_models_within_the_context(made: Made) -> None:
    loaded = load_model(made.source)
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    replaced = made.replaced().state_dict()
    with prefix_weights(made.folder, loaded):
        for name, value in loaded.model.state_dict().items():
            assert value.shape == before[name].shape
            torch.testing.assert_close(value, replaced[name], rtol=0, atol=1e-4 * float(value.abs().max()))
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())


def test_inputs_are_those_of_the_compressed_model(made: Made, tmp_path: Path) -> None:
    loaded = load_model(made.source)
    own = second_moments(loaded, tmp_path / "own", None)
    prefix = second_moments(loaded, tmp_path / "prefix", made.folder)
    compressed = load_model(made.source)
    compressed.model.load_state_dict(made.replaced().state_dict())
    expected = second_moments(compressed, tmp_path / "expected", None)
    for name, H in expected.items():
        torch.testing.assert_close(prefix[name], H, rtol=5e-3, atol=5e-3 * float(H.abs().max()))
    assert any(not torch.allclose(own[name], prefix[name], rtol=1e-2) for name in own)


def test_an_artifact_of_another_model_is_refused(made: Made, tmp_path: Path) -> None:
    other = make("opt", tmp_path)
    with pytest.raises(UserError, match="compiled from another model"):
        prefix_digest(other.folder, load_model(made.source))
    assert len(prefix_digest(made.folder, load_model(made.source))) == 64
