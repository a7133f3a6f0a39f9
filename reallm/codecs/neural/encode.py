"""The encoder for a given neural decoder: every column's codes chosen together in decoded space.

1. A scale a block of columns, from its power.
2. Codes column by column: the cheapest walk to the column's target (see `walks`), with feedback after the errors of the
   columns before it were spread onto it (GPTQ, arXiv 2210.17323); without, to the column itself.
3. Scales by least squares in the metric, then, with feedback, passes of coordinate descent: each column's codes again,
   given all others (QuantEase, arXiv 2309.01885). The best state is kept; a pass that gains under MIN_GAIN is the last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reallm.codecs.feedback import descend, feed_back
from reallm.codecs.metric import Workspace
from reallm.codecs.packed_fields import to_half
from reallm.decoding.neural import stored_values, windows_of
from reallm.kernels.formats.codecs import TILE, NeuralCodec

from .viterbi import cheapest_walks

MAX_PASSES = 2
MIN_GAIN = 0.005
RIDGE = 1e-6


def patches(columns: Tensor, dim: int) -> Tensor:
    """Columns [n, N] cut into patches [n, ceil(N / dim), dim], the last padded with zeros."""
    padded = torch.nn.functional.pad(columns, (0, -columns.shape[1] % dim))
    return padded.view(len(columns), -1, dim)


def block_scales(W: Tensor) -> Tensor:
    """Root mean square of every block of TILE columns as stored, [blocks]; 1 where it is zero."""
    power = torch.stack([block.square().mean() for block in torch.split(W, TILE, 1)])
    scales = to_half(power.sqrt())
    return torch.where(scales == 0, torch.ones_like(scales), scales)


@dataclass(frozen=True)
class _Snapshot:
    codes: Tensor
    scales: Tensor
    decoded: Tensor
    cost: float


class _Encoder:
    """One matrix W[N, K] while its codes are chosen."""

    def __init__(self, W: Tensor, codec: NeuralCodec, work: Workspace, values: Tensor) -> None:
        self.W, self.codec, self.work, self.values = W, codec, work, values
        self.scales = block_scales(W)
        self.codes = torch.zeros(W.shape[1], -(-W.shape[0] // codec.dim), dtype=torch.int64)
        self.plain = torch.zeros(W.shape[1], W.shape[0])
        """Decoded columns [K, N] before their scales."""

    def quantise(self, columns: Tensor, targets: Tensor) -> Tensor:
        """Choose the codes of `columns` int64 [n] for `targets` [n, N]; returns what they decode to."""
        scale = self.scales[columns // TILE, None]
        found = cheapest_walks(self.codec, patches(targets / scale, self.codec.dim), self.values)
        decoded = self.values[windows_of(self.codec, found.T)].transpose(0, 1).flatten(1)[:, : targets.shape[1]]
        self.codes[columns], self.plain[columns] = found, decoded
        return decoded * scale

    def decoded(self) -> Tensor:
        """What the state decodes to, [N, K]."""
        return (self.plain * self.scales.repeat_interleave(TILE)[: len(self.plain), None]).T

    def cost(self) -> float:
        error = self.W - self.decoded()
        return float(((error @ self.work.hessian32) * error).sum(dtype=torch.float64))

    def snapshot(self) -> _Snapshot:
        """A copy of the state."""
        return _Snapshot(self.codes.clone(), self.scales.clone(), self.decoded(), self.cost())

    def one(self, position: int, target: Tensor) -> Tensor:
        """`quantise` for the column at a position of the order of feedback."""
        return self.quantise(self.work.order[position : position + 1], target[None])[0]

    def refit_scales(self) -> None:
        """Scales minimising tr(E H E^T), those there are where that is singular."""
        owner = torch.arange(len(self.plain)) // TILE
        gram = (self.plain @ self.plain.T * self.work.hessian32).double()
        blocks = len(self.scales)
        gram = torch.zeros(blocks, len(owner), dtype=torch.float64).index_add_(0, owner, gram)
        gram = torch.zeros(blocks, blocks, dtype=torch.float64).index_add_(1, owner, gram)
        slope = ((self.W @ self.work.hessian32) * self.plain.T).sum(0, dtype=torch.float64)
        right = torch.zeros(blocks, dtype=torch.float64).index_add_(0, owner, slope)
        ridge = RIDGE * gram.diagonal().mean().clamp_min(1e-30)
        system = gram + ridge * torch.eye(blocks, dtype=torch.float64)
        solved, failed = torch.linalg.solve_ex(system, right + ridge * self.scales)
        if not int(failed) and bool(torch.isfinite(solved).all()):
            stored = to_half(solved.float())
            self.scales = torch.where(stored == 0, self.scales, stored)


def encode_neural(
    W: Tensor, codec: NeuralCodec, feedback: bool, work: Workspace, raw: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """(fields, what they decode to [N, K]) for W[N, K] float32 and the bytes `raw` of the decoder."""
    state = _Encoder(W, codec, work, stored_values(codec, raw))
    if feedback:
        feed_back(W.T[work.order].contiguous(), work.ordered_factor, state.one)
    else:
        state.quantise(torch.arange(W.shape[1]), W.T.contiguous())
    best = state.snapshot()
    state.refit_scales()
    best = min(best, state.snapshot(), key=lambda kept: kept.cost)
    for _ in range(MAX_PASSES if feedback else 0):
        before = best.cost
        columns, values = W.T[work.order].contiguous(), state.decoded().T[work.order].contiguous()
        descend(columns, values, work.ordered_hessian, state.one)
        state.refit_scales()
        best = min(best, state.snapshot(), key=lambda kept: kept.cost)
        if best.cost > (1 - MIN_GAIN) * before:
            break
    full = torch.stack([block.any() for block in torch.split(W, TILE, 1)])
    decoded = best.decoded * full.repeat_interleave(TILE)[: W.shape[1]]
    return {"codes": best.codes.T.contiguous(), "scales": best.scales * full}, decoded
