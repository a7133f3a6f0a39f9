"""A permutation of the columns that puts similar ones side by side (ReALLM, arXiv 2405.13155).

A greedy chain: after the column of the largest norm, always the one nearest to the mean of the last RUN placed.
Distances are taken between random projections of the columns on PROJECTIONS axes, which keep them within a few tenths
(Johnson and Lindenstrauss), so that K columns take O(K^2 PROJECTIONS). For scales by group the chain is taken only
where it rounds better than columns sorted by norm, and either only where better than columns as they are. For the
trellis, whose blocks of columns get bits by what their errors cost, columns alike in that are the similar ones: falling
diagonal of H. Other codecs gain nothing measurable from an order (docs/log.md) and keep theirs.
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
RUN = 16  # ReALLM's


def similar_columns(W: Tensor, fmt: Format, work: Workspace) -> Tensor:
    """Columns of W[N, K] in coding order, int64 [K]."""
    natural = torch.arange(W.shape[1])
    if isinstance(fmt.codec, TrellisCodec):
        return work.order
    if not isinstance(fmt.codec, ScalarCodec) or not RoundingCost.knows(fmt):
        return natural
    orders = (natural, column_chain(W), W.square().sum(0).argsort(descending=True, stable=True))
    judge = RoundingCost(fmt, work)

    def cost(order: Tensor) -> float:
        error = judge.error(W[:, order].contiguous(), judge.weight[order])
        return judge.cost(error[:, order.argsort()])

    return min(orders, key=cost)


def column_chain(W: Tensor) -> Tensor:
    """The greedy chain of the columns of W[N, K], int64 [K]; the same for the same W."""
    columns = W.T.contiguous()
    if len(W) > PROJECTIONS:
        axes = torch.randn(len(W), PROJECTIONS, generator=torch.Generator().manual_seed(0))
        columns = columns @ (axes / math.sqrt(PROJECTIONS))
    half_norms = columns.square().sum(1) / 2
    order = [int(half_norms.argmax())]
    half_norms[order[0]] = torch.inf  # placed
    for _ in range(1, len(columns)):
        target = columns[order[-RUN:]].mean(0)
        order.append(int(torch.addmv(half_norms, columns, target, alpha=-1).numpy().argmin()))  # torch's is slower
        half_norms[order[-1]] = torch.inf
    return torch.tensor(order)
