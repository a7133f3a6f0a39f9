"""What an error costs: the guided Hessian, the diagonal Fisher, and the factorisations that encoders share.

With E = W - W_hat, the cost of storing W as W_hat is, in nats per token,

    1/2 sum_n r_n e_n H e_n^T + 1/2 sum F_extra * E^2,

H the guided Hessian (GuidedQuant, arXiv 2505.07004), r a weight per row (only an output head, whose rows are tokens of
very different frequency, has one) and F_extra the diagonal Fisher of an embedding's look-ups.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from reallm.decoding.rotation import rotate_both

LOG = logging.getLogger(__name__)
DAMPING = 0.01  # share of the mean diagonal added to H (GPTQ, arXiv 2210.17323)
OUTPUT_DAMPING = 2.0
"""Share of the mean diagonal added to the output's Hessian; less trusts it too far (docs/log.md)."""
MAX_DAMPING = 1e4
SMALL = 128
"""Triangular matrices up to this size are inverted directly."""


def symmetric(H: Tensor) -> Tensor:
    """H without the asymmetry that rounding gave it."""
    return (H + H.T) / 2


def _upper_inverse(R: Tensor) -> Tensor:
    """R^-1 of an upper triangular R, by halves: n^3 / 3 flops nearly all in products of matrices."""
    n, half = len(R), len(R) // 2
    if n <= SMALL:
        corner: Tensor = torch.linalg.solve_triangular(R, torch.eye(n, dtype=R.dtype), upper=True)
        return corner
    result = torch.zeros_like(R)
    result[:half, :half], result[half:, half:] = _upper_inverse(R[:half, :half]), _upper_inverse(R[half:, half:])
    result[:half, half:] = -(result[:half, :half] @ R[:half, half:] @ result[half:, half:])
    return result


def _root(H: Tensor) -> Tensor:
    lower, failed = torch.linalg.cholesky_ex(H)
    return (torch.diag(H.diagonal().sqrt()) if int(failed) else lower).float()


@dataclass(frozen=True)
class Metric:
    """The cost of an error of one matrix W[N, K]; float32 tensors on the CPU."""

    hessian: Tensor
    """Guided Hessian [K, K]."""
    fisher: Tensor
    """Diagonal Fisher [N, K], for the record and for LQ-LoRA's weighting."""
    row_weight: Tensor | None = None
    """[N], mean one."""
    extra_fisher: Tensor | None = None
    """[N, K]."""
    gram: Tensor | None = None
    """Second moment of the output's gradients, tokens weighted by their inputs [N, N]; for two-sided feedback."""

    def guided(self, error: Tensor) -> float:
        """Cost of `error` [N, K] in nats per token."""
        product = (error @ self.hessian).mul_(error).sum(1)
        if self.row_weight is not None:
            product = product * self.row_weight
        total = product.double().sum()
        if self.extra_fisher is not None:
            total = total + (self.extra_fisher * error.square()).sum(dtype=torch.float64)
        return 0.5 * max(float(total), 0.0)

    def diagonal(self, error: Tensor) -> float:
        """Diagonal-Fisher cost of `error` [N, K] in nats per token (LQ-LoRA, arXiv 2311.12023)."""
        return 0.5 * float((self.fisher * error.square()).sum(dtype=torch.float64))


class Workspace:
    """Factorisations of one matrix's metric, made once and used by every candidate format.

    `order` is the order in which error feedback visits the columns: falling diagonal of H (GPTQ's act-order). Groups
    and scales stay in storage order, so the order costs no byte.
    """

    def __init__(self, metric: Metric, hessian: Tensor | None = None, output_hessian: Tensor | None = None) -> None:
        """Of a matrix itself; the two Hessians are given for a transformed one, whose metric is its parent's."""
        self.metric = metric
        self.notes: list[str] = []
        self._hessian, self._output_hessian = hessian, output_hessian

    def two_sided(self, error: Tensor) -> float:
        """1/2 tr(G E H E^T) in nats per token, G with mean diagonal one; the guided cost where G is unknown."""
        G = self.cost_weight
        if G is None:
            return self.metric.guided(error)
        return 0.5 * max(float(((G @ error) * (error @ self.metric.hessian)).sum(dtype=torch.float64)), 0.0)

    @cached_property
    def cost_weight(self) -> Tensor | None:
        """`output_hessian` over its mean diagonal, float32 [N, N]."""
        G = self.output_hessian
        return None if G is None else (G / G.diagonal().mean()).float()

    @cached_property
    def column_weight(self) -> Tensor:
        """Diagonal of the encoder's Hessian, [K], positive."""
        return self.hessian.diagonal().float().clamp_min(1e-30)

    @cached_property
    def hessian(self) -> Tensor:
        """The damped Hessian that encoders minimise in, float64 [K, K].

        Scaled by a power of two to a mean diagonal near one, which changes no choice and keeps float32 from underflow.
        Dead columns (never active in the calibration text) get the smallest live diagonal, so that their weights are
        still rounded to something sensible.
        """
        if self._hessian is not None:
            return self._hessian
        H = self.metric.hessian.double()
        H = (H + H.T) / 2
        if self.metric.extra_fisher is not None:
            H = H + torch.diag(self.metric.extra_fisher.double().mean(0))
        diagonal = H.diagonal().clone()
        if not bool(torch.isfinite(H).all()) or not bool((diagonal > 0).any()):
            self.notes.append("Hessian is zero or not finite: plain squared error is used")
            return torch.eye(H.shape[0], dtype=torch.float64)
        dead = diagonal <= 0
        if bool(dead.any()):
            self.notes.append(f"{int(dead.sum())} dead columns")
            H = H.clone()
            H.diagonal()[dead] = diagonal[~dead].min()
        mean = diagonal.clamp_min(0).mean()
        H = H + DAMPING * mean * torch.eye(H.shape[0], dtype=torch.float64)
        return self._positive(torch.ldexp(H, -torch.frexp(mean).exponent))

    def _positive(self, H: Tensor) -> Tensor:
        """H [K, K] with more damping while it is not positive definite: one that is not makes some errors pay."""
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
        """The metric's diagonal Fisher [N, K]; ones where that is not finite."""
        if bool(torch.isfinite(self.metric.fisher).all()):
            return self.metric.fisher
        self.notes.append("diagonal Fisher is not finite: low rank by plain squared error")
        return torch.ones_like(self.metric.fisher)

    @cached_property
    def output_hessian(self) -> Tensor | None:
        """The damped second moment of the output's gradients, float64 [N, N], mean diagonal one; None if unknown."""
        if self._output_hessian is not None or self.metric.gram is None:
            return self._output_hessian
        G = self.metric.gram.double()
        mean = G.diagonal().mean()
        if not bool(torch.isfinite(G).all()) or float(mean) <= 0:
            self.notes.append("output gradients are zero or not finite: feedback is one-sided")
            return None
        return (G + G.T) / (2 * mean) + OUTPUT_DAMPING * torch.eye(len(G), dtype=torch.float64)

    def cost(self, error: Tensor, two_sided: bool) -> float:
        """What encoders minimise: the two-sided or the guided cost, in nats per token."""
        return self.two_sided(error) if two_sided else self.metric.guided(error)

    @cached_property
    def rotated(self) -> Workspace:
        """The workspace of R_N W R_K^T; shared by all formats that rotate."""
        output = self.output_hessian
        rotated_output = None if output is None else symmetric(rotate_both(output))
        child = Workspace(self.metric, symmetric(rotate_both(self.hessian)), rotated_output)
        child.notes = self.notes
        return child

    @cached_property
    def order(self) -> Tensor:
        """Columns by falling diagonal of H, int64 [K]; ties keep their place."""
        return torch.argsort(self.hessian.diagonal(), descending=True, stable=True)

    def inverse_factor(self, order: Tensor | None = None) -> Tensor:
        """U upper triangular with (H[order, order])^-1 = U^T U, float32 [K, K]; more damping while it fails."""
        return self._factor(self.hessian if order is None else self.hessian[order][:, order])

    @cached_property
    def natural_factor(self) -> Tensor:
        """`inverse_factor` in storage order."""
        return self.inverse_factor()

    @cached_property
    def output_factor(self) -> Tensor | None:
        """As `inverse_factor`, of the output's Hessian in storage order, float32 [N, N]."""
        return None if self.output_hessian is None else self._factor(self.output_hessian)

    def _factor(self, H: Tensor) -> Tensor:
        eye, mean = torch.eye(H.shape[0], dtype=torch.float64), float(H.diagonal().mean())
        extra = 0.0
        while extra <= MAX_DAMPING:
            lower, failed = torch.linalg.cholesky_ex((H + extra * mean * eye).flip(0, 1))
            if not int(failed):  # H = R R^T with R upper triangular, so H^-1 = (R^-1)^T R^-1
                if extra:
                    self.notes.append(f"Hessian needed {extra:g} of its mean diagonal as damping")
                return _upper_inverse(lower.flip(0, 1)).float()
            extra = max(10 * extra, DAMPING)
        self.notes.append("Hessian has no Cholesky factor: its diagonal is used")
        return torch.diag(H.diagonal().rsqrt()).float()

    @cached_property
    def ordered_factor(self) -> Tensor:
        """`inverse_factor` in the order of feedback."""
        return self.inverse_factor(self.order)

    @cached_property
    def feedback_weight(self) -> Tensor:
        """What a squared error of each column costs once those after it make up for it, 1 / U_jj^2, float32 [K]."""
        weight = torch.empty(len(self.order))
        weight[self.order] = self.ordered_factor.diagonal().square().reciprocal()
        return weight

    @cached_property
    def ordered_hessian(self) -> Tensor:
        """`hessian` in the order of feedback, float32 [K, K]."""
        return self.hessian[self.order][:, self.order].float()

    @cached_property
    def root(self) -> Tensor:
        """C lower triangular with C C^T = H, float32 [K, K]."""
        return _root(self.hessian)

    @cached_property
    def output_root(self) -> Tensor | None:
        """As `root`, of the output's Hessian, float32 [N, N]; None if unknown."""
        return None if self.output_hessian is None else _root(self.output_hessian)

    @cached_property
    def hessian32(self) -> Tensor:
        """`hessian` in float32."""
        return self.hessian.float()
