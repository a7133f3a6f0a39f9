"""The encoder for row tables: every row has its own table of levels (SqueezeLLM, arXiv 2306.07629).

1. The levels of each row are fitted by weighted k-means: Lloyd's iterations run from several starts, and the result
   with the smallest sum_k h_k (w_k - level of w_k's cell)^2 is kept. In a sorted row each cell is a contiguous run, so
   prefix sums of h and h w give all means in O(2^bits log K) per iteration.
2. Each code is the nearest level of the row's table, or is chosen with error feedback in the metric of H (GPTQ, arXiv
   2210.17323).
3. With feedback, the levels are refitted to the codes: with A[K, 2^bits] the one-hot codes of a row, e = w - A levels,
   so e H e^T is smallest where (A^T H A) levels = A^T H w. A pass of coordinate descent over the codes follows. Refit
   and pass are repeated, and each row keeps its best round.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reallm.codecs.encoder import CodedMatrix, EncodingContext
from reallm.codecs.feedback import descend, feed_back
from reallm.codecs.metric import Workspace
from reallm.codecs.packed_fields import to_half
from reallm.kernels.formats.codecs import KMeansCodec

ITERATIONS = 50
DESCENTS = 2
START_POWERS = (1.0, 1 / 3)
"""Exponents p: the iterations start at levels that cut the total of h^p into equal shares. For many levels, the best
cells have equal totals of h^(1/3) (Panter and Dite)."""
REFIT_RIDGE = 1e-4  # strength of the pull towards the previous level, in units of the mean curvature


@dataclass(frozen=True)
class RowTables:
    """The codes and tables of a matrix."""

    codes: Tensor
    """int64 [N, K]"""
    levels: Tensor
    """The table of each row, float32 [N, 2^bits], in rising order, rounded to fp16."""

    @property
    def decoded(self) -> Tensor:
        """The decoded matrix W_hat [N, K]."""
        return self.levels.gather(1, self.codes)


class _SortedRows:
    """The rows of W sorted, with prefix sums of their weights, so that sums over cells take O(log K)."""

    def __init__(self, W: Tensor, weight: Tensor) -> None:
        self.values, order = W.sort(1)
        self.weight = weight.expand_as(W).gather(1, order).double()
        self.mass, self.moment = _prefix(self.weight), _prefix(self.weight * self.values)

    def quantiles(self, power: float, count: int) -> Tensor:
        """Starting levels [N, count]: the medians of `count` runs of the row with equal sums of weight^power."""
        mass = self.weight.pow(power).cumsum(1)
        middles = (torch.arange(count, dtype=torch.float64) + 0.5) / count * mass[:, -1:]
        positions = torch.searchsorted(mass, middles).clamp_max(self.values.shape[1] - 1)
        return self.values.gather(1, positions)

    def spread(self, count: int) -> Tensor:
        """Starting levels [N, count]: the middles of `count` equal parts of the row's range."""
        low, high = self.values[:, :1], self.values[:, -1:]
        return low + (high - low) * (torch.arange(count) + 0.5) / count

    def cells(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """(sum of weights, weighted sum), [N, count] each, of the entries nearest to each level."""
        inner = torch.searchsorted(self.values, _edges(levels))
        ends = torch.nn.functional.pad(inner, (0, 1), value=self.values.shape[1])
        starts = torch.nn.functional.pad(inner, (1, 0))
        return (
            self.mass.gather(1, ends) - self.mass.gather(1, starts),
            self.moment.gather(1, ends) - self.moment.gather(1, starts),
        )

    def lloyd(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Run Lloyd's iterations from `levels` [N, count].

        Returns levels [N, count] rounded to fp16, and their weighted squared error [N] minus sum_k h_k w_k^2.
        """
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
    """Fit the table of every row of W[N, K]: levels [N, count], in rising order, rounded to fp16.

    `weight`, [K] or [N, K], holds the positive weights of the squared errors.
    """
    rows = _SortedRows(W, weight)
    best, best_error = rows.lloyd(rows.spread(count))
    for power in START_POWERS:
        levels, error = rows.lloyd(rows.quantiles(power, count))
        best = torch.where((error < best_error)[:, None], levels, best)
        best_error = torch.minimum(best_error, error)
    return best


def round_kmeans(W: Tensor, codec: KMeansCodec, weight: Tensor) -> RowTables:
    """Fit tables to W[N, K] and round to the nearest codes; `weight` [K] weights the squared errors by column."""
    levels = fit_levels(W, weight, 1 << codec.bits)
    return RowTables(torch.searchsorted(_edges(levels), W.contiguous()), levels)


def refit_levels(W: Tensor, tables: RowTables, hessian: Tensor) -> Tensor:
    """Fit levels [N, 2^bits] that minimise e H e^T for each row with its codes fixed.

    A small ridge pulls towards the previous levels.
    """
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


class _FeedbackFit:
    """The codes and levels of one matrix during fitting, which updates them in turn.

    Columns are in the order of feedback.
    """

    def __init__(self, W: Tensor, levels: Tensor, work: Workspace) -> None:
        self.W, self.work = W, work
        self.columns = W.T[work.order].contiguous()
        self.codes = torch.empty(self.columns.shape, dtype=torch.int64)
        self.set_levels(levels)

    def set_levels(self, levels: Tensor) -> None:
        self.levels = levels.sort(1).values
        self.edges = _edges(self.levels)

    def quantise(self, position: int, target: Tensor) -> Tensor:
        """Choose the codes of the column at `position` for `target` [N]; returns the decoded values [N]."""
        codes = torch.searchsorted(self.edges, target[:, None])
        self.codes[position] = codes[:, 0]
        return self.levels.gather(1, codes)[:, 0]

    def feed_back(self) -> None:
        feed_back(self.columns.clone(), self.work.ordered_factor, self.quantise)

    def improve(self) -> None:
        """Refit the levels to the codes, then run one pass of coordinate descent."""
        refitted = refit_levels(self.W, self.result(), self.work.hessian32)
        before = refitted.gather(1, self.result().codes)
        self.set_levels(refitted)
        descend(self.columns, before.T[self.work.order].contiguous(), self.work.ordered_hessian, self.quantise)

    def result(self) -> RowTables:
        stored = torch.empty_like(self.codes)
        stored[self.work.order] = self.codes
        return RowTables(stored.T.contiguous(), self.levels)


def _row_costs(W: Tensor, tables: RowTables, work: Workspace) -> Tensor:
    error = W - tables.decoded
    return ((error @ work.hessian32) * error).sum(1, dtype=torch.float64)


def _better(first: RowTables, second: RowTables, W: Tensor, work: Workspace) -> RowTables:
    """For every row, take the codes and table with the lower cost; `first` if the costs are equal."""
    cheaper = (_row_costs(W, second, work) < _row_costs(W, first, work))[:, None]
    return RowTables(torch.where(cheaper, second.codes, first.codes), torch.where(cheaper, second.levels, first.levels))


def encode_kmeans(W: Tensor, codec: KMeansCodec, context: EncodingContext) -> CodedMatrix:
    """Encode W[N, K] float32 with a table for every row; see `encoder` for the interface."""
    work = context.work
    best = round_kmeans(W, codec, work.column_weight)
    if context.fmt.feedback:
        fit = _FeedbackFit(W, fit_levels(W, work.feedback_weight, 1 << codec.bits), work)
        fit.feed_back()
        best = _better(best, fit.result(), W, work)
        for _ in range(DESCENTS):
            fit.improve()
            best = _better(best, fit.result(), W, work)
    return CodedMatrix({"codes": best.codes, "levels": best.levels}, best.decoded)
