"""Device names: what is accepted, and the errors."""

from __future__ import annotations

import pytest
import torch

from reallm.errors import UserError
from reallm.system.device import parse_device, placed


def test_a_usable_device_is_returned() -> None:
    assert parse_device("cpu") == torch.device("cpu")
    assert parse_device("cpu", allowed=("cpu", "cuda")) == torch.device("cpu")


@pytest.mark.parametrize("name", ["nowhere", "cuda:77"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"--device {name} cannot be used here"):
        parse_device(name)


def test_only_allowed_devices_are_accepted() -> None:
    with pytest.raises(UserError, match="--device meta: expected cpu, cuda or auto"):
        parse_device("meta", allowed=("cpu", "cuda"))


@pytest.mark.parametrize(("available", "expected"), [(False, "cpu"), (True, "cuda")])
def test_auto_is_a_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch, available: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert parse_device("auto") == torch.device(expected)
    assert parse_device("auto", allowed=("cpu", "cuda")) == torch.device(expected)


def test_a_model_is_elsewhere_only_within_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(3, 2)
    weight = model.weight.data
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: tensor.clone() if device.type == "cuda" else tensor)
    with pytest.raises(KeyError), placed(model.parameters(), torch.device("cuda")):
        assert model.weight.data_ptr() != weight.data_ptr() and torch.equal(model.weight, weight)
        raise KeyError
    assert model.weight.data_ptr() == weight.data_ptr()
