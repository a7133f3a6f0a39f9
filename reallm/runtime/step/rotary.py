"""The rotary tables of a decode step, and the error for a model that has no decode step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class StepUnsupportedError(Exception):
    """The decode step does not support the model, for the reason in the message."""


def rotary_table(model: nn.Module, name: str, positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary table `name`, each [positions, head_dim / 2], computed by the model's own module.

    Raises StepUnsupportedError.
    """
    module: Any = model.get_submodule("model.rotary_emb")
    kind = name.partition(".")[2]
    device: Any = model.device
    index = torch.arange(positions, device=device)[None]
    dtype = torch.zeros(1, device=device)
    with torch.no_grad():
        cosines, sines = module(dtype, index, kind) if kind else module(dtype, index)
    half = cosines.shape[-1] // 2
    if not all(torch.equal(each[..., :half], each[..., half:]) for each in (cosines, sines)):
        raise StepUnsupportedError("the rotary embedding rotates the two halves of a head by different angles")
    return cosines[0, :, :half].contiguous(), sines[0, :, :half].contiguous()
