"""The low-rank term: a truncated SVD in one of three metrics, and factors rounded to the precision they are stored in.

Let Q be the decoded codes and E = W - Q the residual that the factors approximate.

- LQ-LoRA's diagonal metric: the SVD of D_row E D_col, where the diagonals D are the square roots of the row and column
  means of the Fisher information (arXiv 2311.12023).
- The metric of H: the SVD of B^T E C with H = C C^T, and G = B B^T for two-sided feedback, otherwise B = I. This is
  optimal for tr(G E H E^T) with the codes fixed.
- The plain squared error, for the first factors if the codes are then chosen with feedback: the cost of such codes is
  about the mean square of the coded matrix times the geometric mean of H's pivots, and the factors change only the
  former.
"""

from __future__ import annotations

import threading
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
"""Clipping ratios for integer factors: the largest code decodes to this share of the component's largest entry. The
ratio with the smallest squared error is used."""

_RANDOM = threading.Lock()
"""Held while the global random generator is seeded and used, because matrices may be encoded in several threads."""
EPSILON = 1e-3
"""Minimum weight of a row or column relative to the largest, so that rows without gradients are not divided by nearly
zero."""


@dataclass(frozen=True)
class Factors:
    """Low-rank factors L[N, r] and R[r, K]."""

    stored: dict[str, Tensor]
    """The values of the term's fields, by field name."""
    left: Tensor
    """L as decoding reads it, float32 [N, r]."""
    right: Tensor
    """R as decoding reads it, float32 [r, K]."""

    @cached_property
    def product(self) -> Tensor:
        """L R, float32 [N, K]."""
        return self.left @ self.right


def _svd(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first `rank` singular triplets (U, S, V^T), by randomised SVD (Halko et al., arXiv 0909.4061) if cheaper."""
    small = min(matrix.shape)
    if rank + OVERSAMPLING > small // 3:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return U[:, :rank], S[:rank], Vh[:rank]
    with _RANDOM, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        U, S, V = torch.svd_lowrank(matrix, q=rank + OVERSAMPLING, niter=POWER_ITERATIONS)
    return U[:, :rank], S[:rank], V[:, :rank].T


def _root_means(fisher: Tensor, dim: int) -> Tensor:
    root = fisher.double().mean(dim).sqrt()
    peak = float(root.max())
    return (root / peak).clamp_min(EPSILON).float() if peak > 0 else torch.ones_like(root, dtype=torch.float32)


def strongest(residual: Tensor, term: LowRank, seed: int) -> Factors:
    """The best low-rank approximation of `residual` [N, K] in plain squared error, in the precision of `term`."""
    U, S, Vh = _svd(residual, min(term.rank, *residual.shape), seed)
    return store_factors(U * S, Vh, term)


def factorise(
    residual: Tensor, term: LowRank, work: Workspace, in_hessian: bool, seed: int, two_sided: bool = False
) -> Factors:
    """The best low-rank approximation of `residual` [N, K] in the metric of `work`, in the precision of `term`.

    With `in_hessian` the metric is that of H, and with `two_sided` also that of G; otherwise it is LQ-LoRA's diagonal
    metric.
    """
    rank = min(term.rank, *residual.shape)
    if in_hessian:
        output_root = work.output_root if two_sided else None
        weighted = residual @ work.root
        U, S, Vh = _svd(weighted if output_root is None else output_root.T @ weighted, rank, seed)
        right = torch.linalg.solve_triangular(work.root, Vh, upper=False, left=False)
        left = U * S if output_root is None else torch.linalg.solve_triangular(output_root.T, U * S, upper=True)
    else:
        rows, cols = _root_means(work.fisher, 1), _root_means(work.fisher, 0)
        U, S, Vh = _svd(rows[:, None] * residual * cols, rank, seed)
        left, right = U * S / rows[:, None], Vh / cols
    return store_factors(left, right, term)


def store_factors(left: Tensor, right: Tensor, term: LowRank) -> Factors:
    """Round L [N, r'] and R [r', K], with r' <= rank, to the precision of `term`.

    That is fp16, or integers with one scale per component for each of L and R. Components beyond r' are zero. Each
    component is first scaled so that its largest entries in L and in R are equal.
    """
    missing = term.rank - left.shape[1]
    if missing:
        left = torch.nn.functional.pad(left, (0, missing))
        right = torch.nn.functional.pad(right, (0, 0, 0, missing))
    left_peak, right_peak = left.abs().amax(0), right.abs().amax(1)
    ratio = (right_peak / left_peak.clamp_min(1e-30)).sqrt()
    balance = torch.where((left_peak > 0) & (right_peak > 0), ratio, torch.ones_like(left_peak))
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
    """(integer codes of `factor`, scale of each component); the entries of a component lie along `dim`."""
    largest = term.largest_code
    peak = factor.abs().amax(dim, keepdim=True)
    candidates = torch.stack([to_half(clip * peak / largest).clamp_min(2.0**-24) for clip in CLIPS[term.dtype]])
    rounded = (factor / candidates).round().clamp(-largest, largest) * candidates
    errors = (factor - rounded).square().sum(dim + 1, keepdim=True)
    scales = candidates.gather(0, errors.argmin(0, keepdim=True))[0]
    return (factor / scales).round().clamp(-largest, largest), scales.squeeze(dim)
