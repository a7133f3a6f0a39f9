"""A codebook, or a table of levels, in training: the codes are fixed, and the values that they index change.

    value = stored + unit shift     shift, one per value, starts at 0; unit: the root mean square of the codebook, or of
                                    a row's levels

The unit makes one learning rate suitable for all matrices. Codebooks are trained after the codes are fixed, as in
AQLM (arXiv 2401.06118).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TrainedCodebook(nn.Module):
    """The values of one field, float32 [count], as `tables` tables of equal size, each with its own unit."""

    def __init__(self, stored: Tensor, tables: int = 1) -> None:
        super().__init__()
        rows = stored.detach().float().reshape(tables, -1)
        self.stored = rows
        self.unit = rows.square().mean(1, keepdim=True).sqrt()
        self.shift = nn.Parameter(torch.zeros_like(rows))

    def forward(self) -> Tensor:
        """The current values, float32 [count]."""
        return (self.stored + self.unit * self.shift).flatten()

    def rounded(self) -> Tensor:
        """The current values in fp16, [count]. Raises ValueError if one is not finite in fp16."""
        values = self.forward().detach().to(torch.float16)
        if not bool(values.isfinite().all()):
            raise ValueError("a value of a codebook is not finite in fp16; train with a smaller learning rate")
        return values
