"""Runs the Triton search for closed walks under Triton's interpreter, for a separate process."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reallm.codecs.trellis.encode import CLIPS


@dataclass(frozen=True)
class SearchCase:
    """Random tiles to search: their number, the trellis, and whether there is feedback between them."""

    state_bits: int
    width: int
    tiles: int = 1
    feedback: bool = False

    @property
    def clip(self) -> float:
        """The clip of the encoder; widths that it does not use get one between those of their neighbours."""
        return CLIPS.get(self.width, 2.0)

    def inputs(self) -> tuple[Tensor, Tensor | None]:
        """(targets [16 tiles, 16] in units of the code, feedback coefficients [tiles, 16 tiles, 16] or None)."""
        generator = torch.Generator().manual_seed(100 * self.state_bits + self.width)
        target = 1.2 * torch.randn(16 * self.tiles, 16, generator=generator)
        target[0, 0], target[-1, -1] = 7.0, -7.0  # outside of the code's range
        below = 0.1 * torch.randn(self.tiles, 16 * self.tiles, 16, generator=generator) if self.feedback else None
        return target, below


def search_interpreted(case: SearchCase) -> tuple[NDArray[np.float32], NDArray[np.uint16]]:
    """The values and states that the kernel finds for `case`, as numpy arrays."""
    from triton.runtime.interpreter import InterpretedFunction

    from reallm.codecs.trellis.device_search import device_walks
    from reallm.codecs.trellis.triton_search import search

    assert isinstance(search, InterpretedFunction)
    torch.set_num_threads(1)
    target, below = case.inputs()
    values, states = device_walks(target, case.state_bits, case.width, case.clip, below)
    return values.numpy(), states
