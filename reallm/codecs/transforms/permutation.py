"""A permutation of the columns that puts similar columns next to each other (ReALLM, arXiv 2405.13155).

For scalar codecs with scales per group, three orders are compared by the cost of rounding: storage order, columns
sorted by falling norm, and a greedy chain. The chain starts at the column with the largest norm and always continues
with the column nearest to the mean of the last RUN columns. Distances are computed between random projections of the
columns onto PROJECTIONS axes, which changes the distances by at most some tens of percent (Johnson and Lindenstrauss)
and takes O(K^2 PROJECTIONS) time for K columns. The trellis codec assigns more bits to blocks of columns whose errors
cost more, so its columns are sorted by falling diagonal of H. Other codecs do not gain measurably from reordering
(docs/log.md) and keep storage order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reallm.codecs.metric import Workspace
from reallm.codecs.rounding import RoundingCost
from reallm.kernels.formats.codecs import ScalarCodec, TrellisCodec
from reallm.kernels.formats.formats import Format

PROJECTIONS = 64
RUN = 16  # as in ReALLM


def similar_columns(W: Tensor, fmt: Format, work: Workspace) -> Tensor:
    """Choose the order in which `fmt` codes the columns of W[N, K]: int64 [K]."""
    natural = torch.arange(W.shape[1])
    if isinstance(fmt.codec, TrellisCodec):
        return work.order
    if not isinstance(fmt.codec, ScalarCodec) or not RoundingCost.supports(fmt):
        return natural
    orders = (natural, column_chain(W), W.square().sum(0).argsort(descending=True, stable=True))
    rounding = RoundingCost(fmt, work)

    def cost(order: Tensor) -> float:
        error = rounding.error(W[:, order].contiguous(), rounding.weight[order])
        return rounding.cost(error[:, order.argsort()])

    return min(orders, key=cost)


def column_chain(W: Tensor) -> Tensor:
    """The order of the columns of W[N, K] along the greedy chain, int64 [K]; deterministic."""
    columns = W.T.contiguous()
    if len(W) > PROJECTIONS:
        axes = torch.randn(len(W), PROJECTIONS, generator=torch.Generator().manual_seed(0))
        columns = columns @ (axes / math.sqrt(PROJECTIONS))
    half_norms = columns.square().sum(1) / 2
    order = [int(half_norms.argmax())]
    half_norms[order[0]] = torch.inf  # already in the chain
    for _ in range(1, len(columns)):
        target = columns[order[-RUN:]].mean(0)
        scores = torch.addmv(half_norms, columns, target, alpha=-1)
        order.append(int(scores.numpy().argmin()))  # faster than torch.argmin

        half_norms[order[-1]] = torch.inf
    return torch.tensor(order)
