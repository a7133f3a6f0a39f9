"""The low-rank term: weighted truncated SVD, and factors in the precision they are stored in.

Three metrics. LQ-LoRA's diagonal one, SVD of D_row (W - Q) D_col with D the roots of the row and column means of the
Fisher (arXiv 2311.12023). That of H, SVD of B^T E C with H = C C^T, and G = B B^T for two-sided feedback, else B = I:
optimal for tr(G E H E^T) once codes are given. And the plain one, for a start before codes with feedback: their cost is
about the power of what they code times the geometric mean of H's pivots, which no choice of factors changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from reallm.codecs.metric import Workspace
from reallm.codecs.packed_fields import to_half
from reallm.kernels.formats.terms import LowRank

OVERSAMPLING = 8
POWER_ITERATIONS = 3
CLIPS = {"i8": (1.0,), "i4": (1.0, 0.9, 0.8, 0.7, 0.6)}
"""Shares of a component's largest entry that its largest code may stand for; the one of least squared error is kept."""
EPSILON = 1e-3  # of the largest weight: a dead row is not to be divided by as little as the SVD's own rounding


@dataclass(frozen=True)
class Factors:
    """L[N, r] and R[r, K]: what is stored, and what that decodes to."""

    stored: dict[str, Tensor]
    left: Tensor
    right: Tensor

    @cached_property
    def product(self) -> Tensor:
        """L R, float32 [N, K]."""
        return self.left @ self.right


def _svd(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading `rank` singular triplets; randomised (Halko et al., arXiv 0909.4061) when that is cheaper."""
    small = min(matrix.shape)
    if rank + OVERSAMPLING > small // 3:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return U[:, :rank], S[:rank], Vh[:rank]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        U, S, V = torch.svd_lowrank(matrix, q=rank + OVERSAMPLING, niter=POWER_ITERATIONS)
    return U[:, :rank], S[:rank], V[:, :rank].T


def _root_means(fisher: Tensor, dim: int) -> Tensor:
    root = fisher.double().mean(dim).sqrt()
    peak = float(root.max())
    return (root / peak).clamp_min(EPSILON).float() if peak > 0 else torch.ones_like(root, dtype=torch.float32)


def strongest(residual: Tensor, term: LowRank, seed: int) -> Factors:
    """Best rank-r approximation of `residual` [N, K] in plain squared error, rounded to the stored precision."""
    U, S, Vh = _svd(residual, min(term.rank, *residual.shape), seed)
    return store_factors(U * S, Vh, term)


def factorise(
    residual: Tensor, term: LowRank, work: Workspace, in_hessian: bool, seed: int, two_sided: bool = False
) -> Factors:
    """Best rank-r approximation of `residual` [N, K] in the metric, rounded to the stored precision."""
    rank = min(term.rank, *residual.shape)
    if in_hessian:
        outer = work.output_root if two_sided else None
        weighted = residual @ work.root
        U, S, Vh = _svd(weighted if outer is None else outer.T @ weighted, rank, seed)
        right = torch.linalg.solve_triangular(work.root, Vh, upper=False, left=False)
        left = U * S if outer is None else torch.linalg.solve_triangular(outer.T, U * S, upper=True)
    else:
        rows, cols = _root_means(work.fisher, 1), _root_means(work.fisher, 0)
        U, S, Vh = _svd(rows[:, None] * residual * cols, rank, seed)
        left, right = U * S / rows[:, None], Vh / cols
    return store_factors(left, right, term)


def store_factors(left: Tensor, right: Tensor, term: LowRank) -> Factors:
    """Round L and R to fp16, or to integers with one scale per component; each component balanced between the two."""
    missing = term.rank - left.shape[1]
    if missing:
        left = torch.nn.functional.pad(left, (0, missing))
        right = torch.nn.functional.pad(right, (0, 0, 0, missing))
    up, down = left.abs().amax(0), right.abs().amax(1)
    balance = torch.where((up > 0) & (down > 0), (down / up.clamp_min(1e-30)).sqrt(), torch.ones_like(up))
    left, right = left * balance, right / balance[:, None]
    if term.dtype == "f16":
        left, right = to_half(left), to_half(right)
        return Factors({"left": left, "right": right}, left, right)
    left_codes, left_scales = _rounded(left, 0, term)
    right_codes, right_scales = _rounded(right, 1, term)
    codes = {"left": left_codes + term.offset, "right": right_codes + term.offset}
    stored = {**codes, "left_scales": left_scales, "right_scales": right_scales}
    return Factors(stored, left_codes * left_scales, right_codes * right_scales[:, None])


def _rounded(factor: Tensor, dim: int, term: LowRank) -> tuple[Tensor, Tensor]:
    """Codes (whole numbers) of `factor`, and the scale of each component, whose entries lie along `dim`."""
    levels = term.largest_code
    peak = factor.abs().amax(dim, keepdim=True)
    tried = torch.stack([to_half(clip * peak / levels).clamp_min(2.0**-24) for clip in CLIPS[term.dtype]])
    errors = (factor - (factor / tried).round().clamp(-levels, levels) * tried).square().sum(dim + 1, keepdim=True)
    scales = tried.gather(0, errors.argmin(0, keepdim=True))[0]
    return (factor / scales).round().clamp(-levels, levels), scales.squeeze(dim)
