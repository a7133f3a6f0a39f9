"""The cost of rounding without error feedback: a quick estimate for comparing transforms before the codes are chosen.

If the format uses feedback, a squared error in column k is weighted by 1 / U_kk^2, the cost that remains after later
columns have compensated for it; otherwise the cost is tr(E H E^T).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from reallm.kernels.formats.codecs import AnyCodec, KMeansCodec, ScalarCodec
from reallm.kernels.formats.formats import Format

from .metric import Workspace
from .scalar.encode import round_scalar
from .scalar.row_tables import round_kmeans


def _decode_rounded_scalar(W: Tensor, codec: ScalarCodec, weight: Tensor) -> Tensor:
    return round_scalar(W, codec, weight).decode(codec)


def _decode_rounded_kmeans(W: Tensor, codec: KMeansCodec, weight: Tensor) -> Tensor:
    return round_kmeans(W, codec, weight).decoded


_ROUND: Mapping[type[AnyCodec], Callable[[Tensor, Any, Tensor], Tensor]] = {
    ScalarCodec: _decode_rounded_scalar,
    KMeansCodec: _decode_rounded_kmeans,
}
"""(W, codec, column weights) -> decoded values of the nearest codes, for codecs that round each weight by itself."""


class RoundingCost:
    """The cost of rounding to the nearest codes of one format."""

    def __init__(self, fmt: Format, work: Workspace) -> None:
        self.codec, self.work, self.feedback = fmt.codec, work, bool(fmt.feedback)
        self.weight = work.feedback_weight if fmt.feedback else work.column_weight
        """The weight of a squared error in each column, [K]."""

    @staticmethod
    def supports(fmt: Format) -> bool:
        """Whether `fmt` can be rounded quickly, with errors that stay in their column (no rotation spreads them)."""
        return type(fmt.codec) in _ROUND and not fmt.rotated

    def error(self, W: Tensor, weight: Tensor) -> Tensor:
        """The error [N, K] of rounding W[N, K] to the nearest codes, with scales fitted for column weights [K]."""
        return W - _ROUND[type(self.codec)](W, self.codec, weight)

    def cost(self, error: Tensor) -> float:
        """The cost of an `error` [N, K] in the untransformed matrix, up to a constant factor."""
        weighted = error * self.weight if self.feedback else error @ self.work.hessian32
        return float((weighted * error).sum(dtype=torch.float64))
