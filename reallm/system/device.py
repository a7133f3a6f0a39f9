"""The torch device that a user names on the command line or in a call."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from reallm.errors import UserError

AUTO = "auto"
CPU = torch.device("cpu")


def parse_device(name: str, allowed: Collection[str] = ()) -> torch.device:
    """Parse the device `name`, such as "cpu" or "cuda:1", and check that it can be used on this machine.

    "auto" is the first CUDA GPU, or the CPU on a machine without one. `allowed` lists the other names that are
    accepted; if it is empty, every device of PyTorch is. The check does not create a context on a CUDA device. Raises
    UserError if the device is not accepted or cannot be used.
    """
    if name == AUTO:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if allowed and name not in allowed:
        raise UserError(f"--device {name}: expected {', '.join(allowed)} or {AUTO}")
    try:
        device = torch.device(name)
        if device.type == "cuda" and torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count():
            return device
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"--device {name} cannot be used here ({reason}); leave it out for the CPU, or use {AUTO}"
        ) from None
    return device


def is_gpu(device: torch.device) -> bool:
    """Whether `device` is a GPU that kernels of Triton run on."""
    return device.type == "cuda"


@contextmanager
def placed(tensors: Iterable[Tensor], device: torch.device) -> Iterator[None]:
    """Move the data of `tensors`, such as the parameters of a model, to `device` within the context.

    Afterwards they have their earlier data again, which stays in memory meanwhile.
    """
    before = [(tensor, tensor.data) for tensor in tensors if tensor.device.type != device.type]
    try:
        for tensor, data in before:
            tensor.data = data.to(device)
        yield
    finally:
        for tensor, data in before:
            tensor.data = data
