"""The low-rank term: weighted truncated SVD, and factors in the precision they are stored in.

Two metrics: LQ-LoRA's diagonal one, SVD of D_row (W - Q) D_col with D the roots of the row and column means of the
Fisher (arXiv 2311.12023); and that of H, SVD of E C with H = C C^T, which is optimal for tr(E H E^T).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reallm.kernels.terms import LowRank

from .metric import Workspace
from .stored import to_half

OVERSAMPLING = 8
POWER_ITERATIONS = 3
EPSILON = 1e-3  # of the largest weight: a dead row is not to be divided by as little as the SVD's own rounding


@dataclass(frozen=True)
class Factors:
    """L[N, r] and R[r, K] as stored: `product` is what they decode to."""

    stored: dict[str, Tensor]
    product: Tensor


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


def factorise(residual: Tensor, term: LowRank, work: Workspace, in_hessian: bool, seed: int) -> Factors:
    """Best rank-r approximation of `residual` [N, K] in the metric, rounded to the stored precision."""
    rank = min(term.rank, *residual.shape)
    if in_hessian:
        U, S, Vh = _svd(residual @ work.root, rank, seed)
        right = torch.linalg.solve_triangular(work.root, Vh, upper=False, left=False)
        left = U * S
    else:
        rows, cols = _root_means(work.fisher, 1), _root_means(work.fisher, 0)
        U, S, Vh = _svd(rows[:, None] * residual * cols, rank, seed)
        left, right = U * S / rows[:, None], Vh / cols
    return store_factors(left, right, term)


def store_factors(left: Tensor, right: Tensor, term: LowRank) -> Factors:
    """Round L and R to fp16, or to int8 with one scale per component; each component balanced between the two."""
    missing = term.rank - left.shape[1]
    if missing:
        left = torch.nn.functional.pad(left, (0, missing))
        right = torch.nn.functional.pad(right, (0, 0, 0, missing))
    up, down = left.abs().amax(0), right.abs().amax(1)
    balance = torch.where((up > 0) & (down > 0), (down / up.clamp_min(1e-30)).sqrt(), torch.ones_like(up))
    left, right = left * balance, right / balance[:, None]
    if term.dtype == "f16":
        left, right = to_half(left), to_half(right)
        return Factors({"left": left, "right": right}, left @ right)
    left_scales = to_half(left.abs().amax(0) / 127).clamp_min(2.0**-24)
    right_scales = to_half(right.abs().amax(1) / 127).clamp_min(2.0**-24)
    left_codes = (left / left_scales).round().clamp(-127, 127)
    right_codes = (right / right_scales[:, None]).round().clamp(-127, 127)
    stored = {
        "left": left_codes,
        "right": right_codes,
        "left_scales": left_scales,
        "right_scales": right_scales,
    }
    return Factors(stored, (left_codes * left_scales) @ (right_codes * right_scales[:, None]))
