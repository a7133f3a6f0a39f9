"""The torch device that a user names on the command line or in a call."""

from __future__ import annotations

from collections.abc import Collection

import torch

from reallm.errors import UserError


def parse_device(name: str, allowed: Collection[str] = ()) -> torch.device:
    """Parse the device `name`, such as "cpu" or "cuda:1", and check that it can be used on this machine.

    `allowed` lists the names that are accepted; if it is empty, every device of PyTorch is. The check does not create a
    context on a CUDA device. Raises UserError if the device is not accepted or cannot be used.
    """
    if allowed and name not in allowed:
        raise UserError(f"--device {name}: expected {' or '.join(allowed)}")
    try:
        device = torch.device(name)
        if device.type == "cuda" and torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count():
            return device
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        reason = str(error).partition("\n")[0]
        raise UserError(f"--device {name} cannot be used here ({reason}); leave it out for the CPU") from None
    return device
