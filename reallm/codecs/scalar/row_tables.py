"""A table of levels for every row, by weighted k-means (SqueezeLLM, arXiv 2306.07629), and with error feedback.

1. Levels: for each row the least of sum_k h_k (w_k - level of its cell)^2 that Lloyd's iterations reach from several
   starts. On a sorted row a cell is a run, so prefix sums of h, h w give all means in O(2^bits log K) an iteration.
2. Codes: the nearest level, or error feedback in the metric of H on the row's own table (GPTQ, arXiv 2210.17323).
3. With feedback, levels refitted to the codes: with A[K, 2^bits] the one-hot codes of a row, e = w - A levels, so
   e H e^T is least where (A^T H A) levels = A^T H w. Then descents; each row keeps its best round.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reallm.codecs.feedback import descend, feed_back
from reallm.codecs.metric import Workspace
from reallm.codecs.packed_fields import to_half
from reallm.kernels.formats.codecs import KMeansCodec

ITERATIONS = 50
DESCENTS = 2
START_POWERS = (1.0, 1 / 3)
"""Starts are quantiles of h^p's mass; cells of equal h^(1/3)-mass are what many levels tend to (Panter and Dite)."""
REFIT_RIDGE = 1e-4  # towards the level there was, in units of the mean curvature


@dataclass(frozen=True)
class RowTables:
    """Codes int64 [N, K] and the rows' tables as stored, float32 [N, 2^bits] in rising order."""

    codes: Tensor
    levels: Tensor

    @property
    def values(self) -> Tensor:
        """W_hat [N, K]."""
        return self.levels.gather(1, self.codes)

    @property
    def fields(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "levels": self.levels}


class _SortedRows:
    """Rows of W in rising order with prefix sums of their weights: weighted cells in time that K hardly enters."""

    def __init__(self, W: Tensor, weight: Tensor) -> None:
        self.values, order = W.sort(1)
        self.weight = weight.expand_as(W).gather(1, order).double()
        self.mass, self.moment = _prefix(self.weight), _prefix(self.weight * self.values)

    def quantiles(self, power: float, count: int) -> Tensor:
        """Levels [N, count] at the middles of `count` shares of the mass of weight^power."""
        share = self.weight.pow(power).cumsum(1)
        wanted = (torch.arange(count, dtype=torch.float64) + 0.5) / count * share[:, -1:]
        found = torch.searchsorted(share, wanted).clamp_max(self.values.shape[1] - 1)
        return self.values.gather(1, found)

    def spread(self, count: int) -> Tensor:
        """Levels [N, count] in the middles of equal parts of the row's range."""
        low, high = self.values[:, :1], self.values[:, -1:]
        return low + (high - low) * (torch.arange(count) + 0.5) / count

    def cells(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """(mass, weighted sum) [N, count] of the weights nearest to each level."""
        inner = torch.searchsorted(self.values, _edges(levels))
        ends = torch.nn.functional.pad(inner, (0, 1), value=self.values.shape[1])
        starts = torch.nn.functional.pad(inner, (1, 0))
        return (
            self.mass.gather(1, ends) - self.mass.gather(1, starts),
            self.moment.gather(1, ends) - self.moment.gather(1, starts),
        )

    def lloyd(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """(levels [N, count] in fp16, their weighted squared error [N] less that of zeros) after Lloyd's iterations."""
        for _ in range(ITERATIONS):
            mass, moment = self.cells(levels)
            moved = torch.where(mass > 0, (moment / mass.clamp_min(1e-300)).float(), levels).sort(1).values
            if torch.equal(moved, levels):
                break
            levels = moved
        levels = to_half(levels)
        mass, moment = self.cells(levels)
        return levels, (levels * (levels * mass - 2 * moment)).sum(1)


def _prefix(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values.cumsum(1), (1, 0))


def _edges(levels: Tensor) -> Tensor:
    return ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()


def fit_levels(W: Tensor, weight: Tensor, count: int) -> Tensor:
    """Levels [N, count] of every row of W[N, K], rising, as fp16 stores them; `weight` is [K] or [N, K], positive."""
    rows = _SortedRows(W, weight)
    best, least = rows.lloyd(rows.spread(count))
    for power in START_POWERS:
        levels, error = rows.lloyd(rows.quantiles(power, count))
        best = torch.where((error < least)[:, None], levels, best)
        least = torch.minimum(least, error)
    return best


def round_kmeans(W: Tensor, codec: KMeansCodec, weight: Tensor) -> RowTables:
    """Tables and nearest codes of W[N, K], a squared error of column k counting `weight` [K]."""
    levels = fit_levels(W, weight, 1 << codec.bits)
    return RowTables(torch.searchsorted(_edges(levels), W.contiguous()), levels)


def refit_levels(W: Tensor, tables: RowTables, hessian: Tensor) -> Tensor:
    """Levels [N, 2^bits] minimising e H e^T row by row for the codes there are, with a small ridge towards the old."""
    count = tables.levels.shape[1]
    right = torch.zeros_like(tables.levels).scatter_add_(1, tables.codes, W @ hessian).double()
    gram = torch.empty(len(W), count, count, dtype=torch.float64)
    for code in range(count):
        pull = (tables.codes == code).float() @ hessian
        gram[:, code] = torch.zeros_like(tables.levels).scatter_add_(1, tables.codes, pull)
    curvature = gram.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).clamp_min(1e-30)
    ridge = REFIT_RIDGE * curvature.expand(-1, count)
    solved, failed = torch.linalg.solve_ex(gram + torch.diag_embed(ridge), right + ridge * tables.levels)
    usable = (failed == 0)[:, None] & torch.isfinite(solved)
    return to_half(torch.where(usable, solved.float(), tables.levels))


class _Fit:
    """One matrix while codes and levels are fitted in turn; columns in the order of feedback."""

    def __init__(self, W: Tensor, levels: Tensor, work: Workspace) -> None:
        self.W, self.work = W, work
        self.columns = W.T[work.order].contiguous()
        self.codes = torch.empty(self.columns.shape, dtype=torch.int64)
        self.set_levels(levels)

    def set_levels(self, levels: Tensor) -> None:
        self.levels = levels.sort(1).values
        self.edges = _edges(self.levels)

    def quantise(self, position: int, target: Tensor) -> Tensor:
        """Round the column at `position` of the order to `target` [N]; returns what it decodes to."""
        codes = torch.searchsorted(self.edges, target[:, None])
        self.codes[position] = codes[:, 0]
        return self.levels.gather(1, codes)[:, 0]

    def feed_back(self) -> None:
        feed_back(self.columns.clone(), self.work.ordered_factor, self.quantise)

    def improve(self) -> None:
        """Refit the levels to the codes, then one pass of descent."""
        refitted = refit_levels(self.W, self.result(), self.work.hessian32)
        before = refitted.gather(1, self.result().codes)
        self.set_levels(refitted)
        descend(self.columns, before.T[self.work.order].contiguous(), self.work.ordered_hessian, self.quantise)

    def result(self) -> RowTables:
        stored = torch.empty_like(self.codes)
        stored[self.work.order] = self.codes
        return RowTables(stored.T.contiguous(), self.levels)


def _row_costs(W: Tensor, tables: RowTables, work: Workspace) -> Tensor:
    error = W - tables.values
    return ((error @ work.hessian32) * error).sum(1, dtype=torch.float64)


def _better(first: RowTables, second: RowTables, W: Tensor, work: Workspace) -> RowTables:
    """Of every row the cheaper one, the first if alike."""
    taken = (_row_costs(W, second, work) < _row_costs(W, first, work))[:, None]
    return RowTables(torch.where(taken, second.codes, first.codes), torch.where(taken, second.levels, first.levels))


def encode_kmeans(W: Tensor, codec: KMeansCodec, feedback: bool, work: Workspace) -> tuple[dict[str, Tensor], Tensor]:
    """(fields, what they decode to) for W[N, K] float32."""
    best = round_kmeans(W, codec, work.column_weight)
    if feedback:
        fit = _Fit(W, fit_levels(W, work.feedback_weight, 1 << codec.bits), work)
        fit.feed_back()
        best = _better(best, fit.result(), W, work)
        for _ in range(DESCENTS):
            fit.improve()
            best = _better(best, fit.result(), W, work)
    return best.fields, best.values
