"""Error feedback and coordinate descent, two ways to choose the codes of a matrix column by column.

With error feedback each column compensates for the errors of the columns before it, which minimises tr(E H E^T)
greedily (GPTQ, arXiv 2210.17323; block LDL in QuIP#, arXiv 2402.04396). With H^-1 = U^T U, U upper triangular, the
target of column j is w_j - sum_{i<j} U_ij err_i, where err_j = (target_j - value_j) / U_jj.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK_COLUMNS = 128


def feed_back(columns: Tensor, factor: Tensor, quantise: Callable[[int, Tensor], Tensor]) -> None:
    """Quantise the columns of W in turn, with error feedback.

    `columns` [K, N] is W transposed, with the columns in the same order as in `factor` U [K, K]; it is overwritten.
    `quantise(position, target [N])` chooses codes for the column at `position` and returns their decoded values [N].
    """
    count = columns.shape[0]
    diagonal = factor.diagonal().tolist()
    for start in range(0, count, BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, count)
        local = factor[start:stop, start:stop].T.contiguous()
        errors = torch.empty(stop - start, columns.shape[1])
        for i in range(stop - start):
            target = columns[start + i]
            if i:
                target = torch.addmv(target, errors[:i].T, local[i, :i], alpha=-1)
            errors[i] = (target - quantise(start + i, target)) / diagonal[start + i]
        if stop < count:
            columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)


def descend(columns: Tensor, values: Tensor, hessian: Tensor, quantise: Callable[[int, Tensor], Tensor]) -> None:
    """Run one pass of coordinate descent on tr(E H E^T): quantise each column again, with all others fixed.

    `columns` [K, N] is W transposed, and `values` [K, N] holds its current decoded values; both have their columns in
    the same order as `hessian` [K, K]. `quantise` is as in `feed_back`. With slope = H E^T, the target of column j is
    value_j + slope_j / H_jj (QuantEase, arXiv 2309.01885).
    """
    slope = hessian @ (columns - values)
    diagonal = hessian.diagonal().tolist()
    for start in range(0, len(columns), BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, len(columns))
        changes = torch.zeros(stop - start, columns.shape[1])
        for i in range(stop - start):
            j = start + i
            current = torch.addmv(slope[j], changes[:i].T, hessian[start:j, j], alpha=-1) if i else slope[j]
            changes[i] = quantise(j, values[j] + current / diagonal[j]) - values[j]
        if stop < len(columns):
            slope[stop:].addmm_(hessian[stop:, start:stop], changes, alpha=-1)
