"""A codebook or a table of levels while it is trained: its codes stay, the values they stand for move.

    value = stored + unit shift     shift, one a value, starts at 0; unit: the root mean square of the codebook, or of
                                    a row's levels

so that a learning rate means the same for every matrix. As AQLM does after its codes are fixed (arXiv 2401.06118).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TrainedCodebook(nn.Module):
    """The values of one field, float32 [count]; `tables` of them share no unit."""

    def __init__(self, stored: Tensor, tables: int = 1) -> None:
        super().__init__()
        rows = stored.detach().float().reshape(tables, -1)
        self.stored = rows
        self.unit = rows.square().mean(1, keepdim=True).sqrt()
        self.shift = nn.Parameter(torch.zeros_like(rows))

    def forward(self) -> Tensor:
        """The values as they are now, float32 [count]."""
        return (self.stored + self.unit * self.shift).flatten()

    def rounded(self) -> Tensor:
        """The values in fp16. Raises ValueError if one is not finite there."""
        values = self.forward().detach().to(torch.float16)
        if not bool(values.isfinite().all()):
            raise ValueError("a value of a codebook is not finite in fp16; train with a smaller learning rate")
        return values
