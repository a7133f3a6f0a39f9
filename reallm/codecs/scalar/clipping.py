"""Learned clipping (OmniQuant, arXiv 2308.13137): gradient descent on the cost moves the ends of each group's grid.

A group of weights w with grid scale s and zero point z decodes to w_hat = (q(w / s + z) - z) s. The ends of the grid
that the scale search found are multiplied by learned factors ("strengths"), which start at one. `uint` has one strength
for each end, with s = (high - low) / (2^bits - 1) and z = -low / s; the other tables have a single strength, for s.
Rounding passes gradients through unchanged inside the grid and stops them outside (a straight-through estimator). The
gradient of 1/2 tr(E H E^T) with respect to w_hat is -E H.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reallm.codecs.grid import Grid
from reallm.codecs.packed_fields import to_half
from reallm.kernels.formats.codecs import ScalarCodec

STEPS = 32
LEARNING_RATE = 0.06
BETAS = (0.9, 0.95)
CHUNK_NUMEL = 1 << 22  # weights whose autograd graph is held in memory at a time

Pull = Callable[[Tensor], Tensor]
"""Error E [N, K] -> E H; for formats with feedback, only the part of E H that feedback will not remove."""


def learn_clipping(
    W: Tensor, codec: ScalarCodec, scales: Tensor, zeros: Tensor | None, pull: Pull
) -> tuple[Tensor, Tensor | None]:
    """Learn scales and zero points [N, G] of W[N, K], starting from `scales` and `zeros`.

    Each row gets the scales and zero points of its cheapest step; the start counts as a step.
    """
    rows = max(1, CHUNK_NUMEL // W.shape[1])
    learned = [
        _learn_rows(W[i : i + rows], codec, scales[i : i + rows], None if zeros is None else zeros[i : i + rows], pull)
        for i in range(0, len(W), rows)
    ]
    zero_parts = [zero for _, zero in learned if zero is not None]
    return torch.cat([scale for scale, _ in learned]), torch.cat(zero_parts) if zero_parts else None


def _learn_rows(
    W: Tensor, codec: ScalarCodec, scales: Tensor, zeros: Tensor | None, pull: Pull
) -> tuple[Tensor, Tensor | None]:
    grid, owner = Grid(codec), torch.arange(W.shape[1]) // codec.group_width(W.shape[1])
    strengths = torch.ones(2 if zeros is not None else 1, *scales.shape, requires_grad=True)
    optimiser = torch.optim.Adam([strengths], lr=LEARNING_RATE, betas=BETAS)
    best_scales, best_zeros, best_cost = scales, zeros, torch.full((len(W),), torch.inf)
    for step in range(STEPS + 1):
        optimiser.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / (STEPS + 1))
        scale, zero = _ends(scales, zeros, strengths, grid)
        values = _decoded(W, scale[:, owner], None if zero is None else zero[:, owner], grid)
        error = (W - values).detach()
        slope = pull(error)
        cost = (slope * error).sum(1)
        better = cost < best_cost
        best_cost = torch.minimum(best_cost, cost)
        best_scales = torch.where(better[:, None], scale.detach(), best_scales)
        if zero is not None and best_zeros is not None:
            best_zeros = torch.where(better[:, None], zero.detach(), best_zeros)
        optimiser.zero_grad()
        # the gradient of half the logarithm of each row's cost
        torch.autograd.backward(values, -slope / cost.abs().clamp_min(1e-30)[:, None])
        optimiser.step()
    return best_scales, best_zeros


def _ends(scales: Tensor, zeros: Tensor | None, strengths: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """(scales, zero points) for the given strengths, rounded as they are stored; differentiable in the strengths."""
    if zeros is None:
        return _through(scales * strengths[0], to_half), None
    low, high = -zeros * scales * strengths[0], (grid.top - zeros) * scales * strengths[1]
    scale = _through((high - low) / grid.top, to_half)
    exact = -low / torch.where(scale == 0, 1.0, scale)
    return scale, _through(exact, lambda zero: zero.round().clamp(0, grid.top))


def _decoded(W: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    """The decoded weights W_hat, differentiable in the scale and the zero point."""
    position = W / torch.where(scale == 0, torch.inf, scale)
    level = grid.value(grid.code(position.detach(), zero if zero is None else zero.detach()), zero)
    low = grid.levels[0] if zero is None else -zero
    high = grid.levels[-1] if zero is None else grid.top - zero
    inside = torch.minimum(torch.maximum(position, low), high)
    return _through(inside, lambda _: level.detach()) * scale


def _through(values: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """`change(values)`, through which gradients pass as if it were `values` (straight-through estimator)."""
    return values + (change(values.detach()) - values.detach())
