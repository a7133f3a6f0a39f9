"""Device names: what is accepted, and the errors."""

from __future__ import annotations

import pytest
import torch

from reallm.errors import UserError
from reallm.system.device import parse_device


def test_a_usable_device_is_returned() -> None:
    assert parse_device("cpu") == torch.device("cpu")
    assert parse_device("cpu", allowed=("cpu", "cuda")) == torch.device("cpu")


@pytest.mark.parametrize("name", ["nowhere", "cuda:77"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"--device {name} cannot be used here"):
        parse_device(name)


def test_only_allowed_devices_are_accepted() -> None:
    with pytest.raises(UserError, match="--device meta: expected cpu or cuda"):
        parse_device("meta", allowed=("cpu", "cuda"))
