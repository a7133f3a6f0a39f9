"""The cost of an error: the guided Hessian, the diagonal Fisher information, and the factorisations encoders share.

With E = W - W_hat, the cost of storing W as W_hat is, in nats per token,

    1/2 sum_n r_n e_n H e_n^T + 1/2 sum F_extra * E^2,

where e_n is row n of E, H is the guided Hessian (GuidedQuant, arXiv 2505.07004), r is a weight per row (other than one
only in an output head, whose rows are tokens of very different frequency), and F_extra is the diagonal Fisher
information of an embedding's look-ups.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from reallm.decoding.rotation import rotate_both, rotate_in_place

LOG = logging.getLogger(__name__)
DAMPING = 0.01
"""Damping of H: the share of the mean of its diagonal that is added to the diagonal (GPTQ, arXiv 2210.17323)."""
OUTPUT_DAMPING = 2.0
"""Damping of the output Hessian G, likewise; with less, encoders would rely too much on an inexact G (docs/log.md)."""
MAX_DAMPING = 1e4
PANEL = 1024
"""Rows of a matrix that are made symmetric at a time, to save memory."""
LARGE = 8192
"""Factorisations of more columns are not kept where they can be computed again: one takes 1.6 GB at 14336 columns."""
DIRECT_SIZE = 128
"""Triangular matrices up to this size are inverted directly."""


def make_symmetric(H: Tensor) -> Tensor:
    """Replace H [n, n] by (H + H^T) / 2, which removes the asymmetry that comes from rounding errors; returns H."""
    for start in range(0, len(H), PANEL):
        rows = slice(start, start + PANEL)
        mean = (H[rows, start:] + H[start:, rows].T) / 2
        H[rows, start:] = mean
        H[start:, rows] = mean.T
    return H


def _invert_upper(R: Tensor) -> Tensor:
    """Replace an upper triangular R [n, n] by its inverse, by recursion on halves; returns R.

    This takes n^3 / 3 flops, mostly in matrix products.
    """
    n, half = len(R), len(R) // 2
    if n <= DIRECT_SIZE:
        R[:] = torch.linalg.solve_triangular(R, torch.eye(n, dtype=R.dtype), upper=True)
        return R
    first, last = _invert_upper(R[:half, :half]), _invert_upper(R[half:, half:])
    R[:half, half:] = -(first @ R[:half, half:] @ last)
    return R


def _root(H: Tensor) -> Tensor:
    """The Cholesky factor of H, float32; if H has none, the square root of its diagonal."""
    lower, failed = torch.linalg.cholesky_ex(H)
    return (torch.diag(H.diagonal().sqrt()) if int(failed) else lower).float()


@dataclass(frozen=True)
class Metric:
    """The cost of errors in one matrix W[N, K]; all tensors are float32 on the CPU."""

    hessian: Tensor
    """H, the guided Hessian [K, K]."""
    fisher: Tensor
    """Diagonal Fisher information [N, K], used for the reported diagonal cost and for LQ-LoRA's weighting."""
    row_weight: Tensor | None = None
    """Row weights r [N], with mean one; None if all are one."""
    extra_fisher: Tensor | None = None
    """F_extra [N, K]; None if zero."""
    gram: Tensor | None = None
    """G [N, N], the second moment of the output's gradients, with each token weighted by its mean squared input; for
    two-sided feedback and cost."""

    def guided(self, error: Tensor) -> float:
        """The cost of `error` [N, K] in nats per token, by the formula at the top of this module."""
        product = (error @ self.hessian).mul_(error).sum(1)
        if self.row_weight is not None:
            product = product * self.row_weight
        total = product.double().sum()
        if self.extra_fisher is not None:
            total = total + (self.extra_fisher * error.square()).sum(dtype=torch.float64)
        return 0.5 * max(float(total), 0.0)

    def diagonal(self, error: Tensor) -> float:
        """The diagonal-Fisher cost of `error` [N, K] in nats per token (LQ-LoRA, arXiv 2311.12023)."""
        return 0.5 * float((self.fisher * error.square()).sum(dtype=torch.float64))


class Workspace:
    """The factorisations of one matrix's metric, computed once and used by every candidate format.

    `notes` collects messages for the user: what was wrong with the statistics and how it was handled.
    """

    def __init__(self, metric: Metric, hessian: Tensor | None = None, output_hessian: Tensor | None = None) -> None:
        """Make the workspace of `metric`.

        For a transformed matrix, `metric` is that of the untransformed one; `hessian` and `output_hessian` are then
        given and replace those derived from `metric`.
        """
        self.metric = metric
        self.notes: list[str] = []
        self._hessian, self._output_hessian = hessian, output_hessian

    def two_sided(self, error: Tensor) -> float:
        """1/2 tr(G E H E^T) in nats per token, with G scaled to a mean diagonal of one; without G, the guided cost."""
        G = self.cost_weight
        if G is None:
            return self.metric.guided(error)
        return 0.5 * max(float(((G @ error) * (error @ self.metric.hessian)).sum(dtype=torch.float64)), 0.0)

    @cached_property
    def cost_weight(self) -> Tensor | None:
        """`output_hessian` divided by the mean of its diagonal, float32 [N, N]; None if unknown."""
        G = self.output_hessian
        return None if G is None else (G / G.diagonal().mean()).float()

    @cached_property
    def column_weight(self) -> Tensor:
        """The diagonal of `hessian`, clamped to positive values, float32 [K]."""
        return self.hessian.diagonal().float().clamp_min(1e-30)

    @cached_property
    def hessian(self) -> Tensor:
        """The damped Hessian in whose metric encoders minimise, float64 [K, K].

        It is scaled by a power of two to a mean diagonal near one, which prevents underflow in float32 and does not
        change which codes are best. Columns whose input is zero throughout the calibration text ("dead" columns) get
        the smallest diagonal of the others, so that their weights are still rounded sensibly.
        """
        if self._hessian is not None:
            return self._hessian
        H = make_symmetric(self.metric.hessian.to(torch.float64, copy=True))
        if self.metric.extra_fisher is not None:
            H.diagonal().add_(self.metric.extra_fisher.double().mean(0))
        diagonal = H.diagonal().clone()
        if not bool(torch.isfinite(H).all()) or not bool((diagonal > 0).any()):
            self.notes.append("Hessian is zero or not finite: plain squared error is used")
            return torch.eye(H.shape[0], dtype=torch.float64)
        dead = diagonal <= 0
        if bool(dead.any()):
            self.notes.append(f"{int(dead.sum())} dead columns")
            H.diagonal()[dead] = diagonal[~dead].min()
        mean = diagonal.clamp_min(0).mean()
        H.diagonal().add_(DAMPING * mean)
        return self._positive(H.mul_(2.0 ** -int(torch.frexp(mean).exponent)))

    def _positive(self, H: Tensor) -> Tensor:
        """Damp H [K, K] further until it is positive definite; otherwise some errors would have a negative cost."""
        if not int(torch.linalg.cholesky_ex(H.float())[1]):
            return H
        extra, mean = 0.0, H.diagonal().mean()
        while int(torch.linalg.cholesky_ex(H + torch.diag((extra * mean).expand(len(H))))[1]):
            extra = max(10 * extra, DAMPING)
            if extra > MAX_DAMPING:
                self.notes.append("Hessian is not positive definite: its diagonal is used")
                return torch.diag(H.diagonal())
        if extra:
            self.notes.append(f"Hessian is not positive definite: {extra:g} of its mean diagonal was added")
        return H + torch.diag((extra * mean).expand(len(H)))

    @cached_property
    def fisher(self) -> Tensor:
        """The metric's diagonal Fisher information [N, K]; all ones if it is not finite."""
        if bool(torch.isfinite(self.metric.fisher).all()):
            return self.metric.fisher
        self.notes.append("diagonal Fisher is not finite: low rank by plain squared error")
        return torch.ones_like(self.metric.fisher)

    @cached_property
    def output_hessian(self) -> Tensor | None:
        """G, the damped second moment of the output's gradients, float64 [N, N]; None if unknown.

        It is scaled to a mean diagonal of one before damping.
        """
        if self._output_hessian is not None or self.metric.gram is None:
            return self._output_hessian
        G = self.metric.gram.to(torch.float64, copy=True)
        mean = G.diagonal().mean()
        if not bool(torch.isfinite(G).all()) or float(mean) <= 0:
            self.notes.append("output gradients are zero or not finite: feedback is one-sided")
            return None
        G = make_symmetric(G).div_(mean)
        G.diagonal().add_(OUTPUT_DAMPING)
        return G

    def cost(self, error: Tensor, two_sided: bool) -> float:
        """The two-sided or the guided cost of `error` [N, K], in nats per token."""
        return self.two_sided(error) if two_sided else self.metric.guided(error)

    @cached_property
    def rotated(self) -> Workspace:
        """The workspace of the rotated matrix R_N W R_K^T, used by all formats with a rotation."""
        rotated_output = self._rotated("output_hessian") if self.output_hessian is not None else None
        child = Workspace(self.metric, self._rotated("hessian"), rotated_output)
        child.notes = self.notes
        return child

    def _rotated(self, name: str) -> Tensor:
        """The rotated `hessian` or `output_hessian`; a large one is not kept as it was, but made again if needed."""
        H: Tensor = getattr(self, name)
        if len(H) <= LARGE:
            return make_symmetric(rotate_both(H).contiguous())
        given = getattr(self, f"_{name}") is not None  # then it may belong to another workspace too
        return make_symmetric(rotate_in_place(H.clone() if given else self.__dict__.pop(name)))

    @cached_property
    def order(self) -> Tensor:
        """The order in which error feedback visits the columns, int64 [K]: by falling diagonal of H (GPTQ's act-order).

        Columns of equal diagonal stay in storage order. The artifact does not need this order, because codes and scales
        are stored in storage order.
        """
        return torch.argsort(self.hessian.diagonal(), descending=True, stable=True)

    def inverse_factor(self, order: Tensor | None = None) -> Tensor:
        """The upper triangular U with (H[order, order])^-1 = U^T U, float32 [K, K]; H is damped more if necessary."""
        return self._factor(self.hessian if order is None else self.hessian[order][:, order])

    @cached_property
    def natural_factor(self) -> Tensor:
        """`inverse_factor` with the columns in storage order."""
        return self.inverse_factor()

    @cached_property
    def output_factor(self) -> Tensor | None:
        """The inverse factor of the output Hessian, in storage order of the rows, float32 [N, N]; None if unknown."""
        return None if self.output_hessian is None else self._factor(self.output_hessian)

    def _factor(self, H: Tensor) -> Tensor:
        mean, extra = float(H.diagonal().mean()), 0.0
        while extra <= MAX_DAMPING:
            damped = H.flip(0, 1)
            damped.diagonal().add_(extra * mean)
            lower, failed = torch.linalg.cholesky_ex(damped)
            del damped
            if not int(failed):  # H = R R^T with R upper triangular, so H^-1 = (R^-1)^T R^-1
                if extra:
                    self.notes.append(f"Hessian needed {extra:g} of its mean diagonal as damping")
                upper = lower.flip(0, 1)
                del lower
                return _invert_upper(upper).float()
            extra = max(10 * extra, DAMPING)
        self.notes.append("Hessian has no Cholesky factor: its diagonal is used")
        return torch.diag(H.diagonal().rsqrt()).float()

    @cached_property
    def ordered_factor(self) -> Tensor:
        """`inverse_factor` with the columns in the order of feedback."""
        return self.inverse_factor(self.order)

    @cached_property
    def feedback_weight(self) -> Tensor:
        """The cost 1 / U_jj^2 [K] per squared error in column j that remains after later columns compensate for it."""
        weight = torch.empty(len(self.order))
        weight[self.order] = self.ordered_factor.diagonal().square().reciprocal()
        return weight

    @cached_property
    def ordered_hessian(self) -> Tensor:
        """`hessian` with the columns in the order of feedback, float32 [K, K]."""
        return self.hessian[self.order][:, self.order].float()

    @cached_property
    def root(self) -> Tensor:
        """The lower triangular C with C C^T = H, float32 [K, K]."""
        return _root(self.hessian)

    @cached_property
    def output_root(self) -> Tensor | None:
        """The lower triangular B with B B^T = G, the output Hessian, float32 [N, N]; None if unknown."""
        return None if self.output_hessian is None else _root(self.output_hessian)

    @cached_property
    def hessian32(self) -> Tensor:
        """`hessian` in float32."""
        return self.hessian.float()
