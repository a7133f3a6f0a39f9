"""The grid of a scalar codec: its levels, the code nearest to a weight, and the level of a code."""

from __future__ import annotations

import torch
from torch import Tensor

from reallm.kernels.codes.tables import table
from reallm.kernels.formats.codecs import ScalarCodec


class Grid:
    """The levels of one scalar codec, for weights that have been divided by their scale."""

    def __init__(self, codec: ScalarCodec) -> None:
        self.uniform = codec.table in ("int", "uint")
        self.top = 2**codec.bits - 1
        self.half = 2 ** (codec.bits - 1)
        self.unsigned = codec.table == "uint"
        self.levels = torch.from_numpy(table(codec.table, codec.bits).copy())
        self.edges = (self.levels[1:] + self.levels[:-1]) / 2

    def code(self, x: Tensor, zero: Tensor | None) -> Tensor:
        """The code nearest to x = w / scale, int64; `zero` is the zero point of an unsigned grid, else None."""
        if not self.uniform:
            return torch.bucketize(x, self.edges)
        position = x + zero if zero is not None else x * self.half + self.half
        return torch.clamp(torch.round(position), 0, self.top).long()

    def value(self, code: Tensor, zero: Tensor | None) -> Tensor:
        """The level of a code, before it is multiplied by the scale."""
        return code.float() - zero if zero is not None else torch.take(self.levels, code.long())


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where the scale is 0."""
    return torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)
