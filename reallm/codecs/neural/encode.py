"""The encoder for a given neural decoder: it chooses all codes of a column together.

1. The scale of each block of columns is set from the block's mean square.
2. The codes are chosen column by column, so that the decoded column is nearest to its target (see `viterbi`). With
   feedback, the target compensates for the errors of the columns before (GPTQ, arXiv 2210.17323); without feedback, it
   is the column itself.
3. The scales are fitted again by least squares in the metric of H. With feedback, passes of coordinate descent follow:
   each column's codes are chosen again, with all other columns fixed (QuantEase, arXiv 2309.01885). The passes end when
   one lowers the cost by a share of less than MIN_GAIN; the best state is returned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reallm.codecs.encoder import CodedMatrix, EncodingContext
from reallm.codecs.feedback import descend, feed_back
from reallm.codecs.metric import Workspace
from reallm.codecs.packed_fields import to_half
from reallm.decoding.neural import stored_values, windows_of
from reallm.kernels.formats.codecs import TILE, NeuralCodec

from .viterbi import cheapest_codes

MAX_PASSES = 2
MIN_GAIN = 0.005
RIDGE = 1e-6  # strength of the pull towards the previous scale, in units of the mean curvature


def patches(columns: Tensor, dim: int) -> Tensor:
    """Cut columns [n, N] into patches [n, ceil(N / dim), dim]; the last patch is padded with zeros."""
    padded = torch.nn.functional.pad(columns, (0, -columns.shape[1] % dim))
    return padded.view(len(columns), -1, dim)


def block_scales(W: Tensor) -> Tensor:
    """The scale of each block of TILE columns, [blocks]: its root mean square, rounded to fp16, or 1 if that is 0."""
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
    """The state of one matrix W[N, K] while its codes are chosen."""

    def __init__(self, W: Tensor, codec: NeuralCodec, work: Workspace, values: Tensor) -> None:
        self.W, self.codec, self.work, self.values = W, codec, work, values
        self.scales = block_scales(W)
        self.codes = torch.zeros(W.shape[1], -(-W.shape[0] // codec.dim), dtype=torch.int64)
        self.unscaled = torch.zeros(W.shape[1], W.shape[0])
        """Decoded columns [K, N] before they are multiplied by their scales."""

    def quantise(self, columns: Tensor, targets: Tensor) -> Tensor:
        """Choose the codes of `columns`, int64 [n], for `targets` [n, N]; returns the decoded values [n, N]."""
        scale = self.scales[columns // TILE, None]
        codes = cheapest_codes(self.codec, patches(targets / scale, self.codec.dim), self.values)
        decoded = self.values[windows_of(self.codec, codes.T)].transpose(0, 1).flatten(1)[:, : targets.shape[1]]
        self.codes[columns], self.unscaled[columns] = codes, decoded
        return decoded * scale

    def decoded(self) -> Tensor:
        """The decoded matrix [N, K] of the current state."""
        return (self.unscaled * self.scales.repeat_interleave(TILE)[: len(self.unscaled), None]).T

    def cost(self) -> float:
        error = self.W - self.decoded()
        return float(((error @ self.work.hessian32) * error).sum(dtype=torch.float64))

    def snapshot(self) -> _Snapshot:
        """A copy of the state."""
        return _Snapshot(self.codes.clone(), self.scales.clone(), self.decoded(), self.cost())

    def quantise_column(self, position: int, target: Tensor) -> Tensor:
        """Call `quantise` for one column, given by its `position` in the order of feedback."""
        return self.quantise(self.work.order[position : position + 1], target[None])[0]

    def refit_scales(self) -> None:
        """Set the scales to those that minimise tr(E H E^T); they stay unchanged if the system is singular."""
        owner = torch.arange(len(self.unscaled)) // TILE
        gram = (self.unscaled @ self.unscaled.T * self.work.hessian32).double()
        blocks = len(self.scales)
        gram = torch.zeros(blocks, len(owner), dtype=torch.float64).index_add_(0, owner, gram)
        gram = torch.zeros(blocks, blocks, dtype=torch.float64).index_add_(1, owner, gram)
        slope = ((self.W @ self.work.hessian32) * self.unscaled.T).sum(0, dtype=torch.float64)
        right = torch.zeros(blocks, dtype=torch.float64).index_add_(0, owner, slope)
        ridge = RIDGE * gram.diagonal().mean().clamp_min(1e-30)
        system = gram + ridge * torch.eye(blocks, dtype=torch.float64)
        solved, failed = torch.linalg.solve_ex(system, right + ridge * self.scales)
        if not int(failed) and bool(torch.isfinite(solved).all()):
            stored = to_half(solved.float())
            self.scales = torch.where(stored == 0, self.scales, stored)


def encode_neural(W: Tensor, codec: NeuralCodec, context: EncodingContext) -> CodedMatrix:
    """Encode W[N, K] float32 for the decoder with the bytes `context.shared`; see `encoder` for the interface."""
    assert context.shared is not None
    work, feedback = context.work, bool(context.fmt.feedback)
    state = _Encoder(W, codec, work, stored_values(codec, context.shared))
    if feedback:
        feed_back(W.T[work.order].contiguous(), work.ordered_factor, state.quantise_column)
    else:
        state.quantise(torch.arange(W.shape[1]), W.T.contiguous())
    best = state.snapshot()
    state.refit_scales()
    best = min(best, state.snapshot(), key=lambda snapshot: snapshot.cost)
    for _ in range(MAX_PASSES if feedback else 0):
        previous_cost = best.cost
        columns, values = W.T[work.order].contiguous(), state.decoded().T[work.order].contiguous()
        descend(columns, values, work.ordered_hessian, state.quantise_column)
        state.refit_scales()
        best = min(best, state.snapshot(), key=lambda snapshot: snapshot.cost)
        if best.cost > (1 - MIN_GAIN) * previous_cost:
            break
    nonzero = torch.stack([block.any() for block in torch.split(W, TILE, 1)])
    decoded = best.decoded * nonzero.repeat_interleave(TILE)[: W.shape[1]]
    return CodedMatrix({"codes": best.codes.T.contiguous(), "scales": best.scales * nonzero}, decoded)
