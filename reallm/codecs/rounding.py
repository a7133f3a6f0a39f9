"""What a choice made before coding is judged by: the cost of the codes without feedback, cheap and near enough.

Under feedback an error in column k costs what later columns cannot make up for, 1 / U_kk^2; without it tr(E H E^T).
"""

from __future__ import annotations

import torch
from torch import Tensor

from reallm.kernels.formats.codecs import KMeansCodec, ScalarCodec
from reallm.kernels.formats.formats import Format

from .metric import Workspace
from .scalar.encode import round_scalar
from .scalar.row_tables import round_kmeans


class RoundingCost:
    """The cost of rounding in one format; `weight` [K] is what a squared error of each column counts."""

    def __init__(self, fmt: Format, work: Workspace) -> None:
        self.codec, self.work, self.feedback = fmt.codec, work, bool(fmt.feedback)
        self.weight = work.feedback_weight if fmt.feedback else work.column_weight

    @staticmethod
    def knows(fmt: Format) -> bool:
        """Whether rounding is quick, and its errors stay with the column they are made in."""
        return isinstance(fmt.codec, ScalarCodec | KMeansCodec) and not fmt.rotated

    def error(self, coded: Tensor, weight: Tensor) -> Tensor:
        """What the nearest codes of `coded` [N, K] miss, columns weighing `weight` [K]."""
        if isinstance(self.codec, KMeansCodec):
            return coded - round_kmeans(coded, self.codec, weight).values
        assert isinstance(self.codec, ScalarCodec)
        return coded - round_scalar(coded, self.codec, weight).values(self.codec)

    def cost(self, error: Tensor) -> float:
        """Of an error of the matrix itself."""
        weighted = error * self.weight if self.feedback else error @ self.work.hessian32
        return float((weighted * error).sum(dtype=torch.float64))
