"""The trellis encoder (QTIP): it assigns widths to blocks of columns and codes each tile by Viterbi search.

1. Widths. With H^-1 = U^T U, the cost of a block b of 16 columns is D_b times the squared error of its code, where
   log D_b = -2 mean_j log U_jj. The geometric mean of D over the blocks follows from det H, so it does not depend on
   the order of the columns. Widths are assigned by reverse water-filling: all blocks start at the smallest width, and
   the block that gains most per bit is widened, until the bits are used up.
2. Codes. Blocks are coded in storage order, and each compensates for the errors of the blocks before it (block LDL;
   QuIP#, arXiv 2402.04396). With two-sided feedback, a tile also compensates for the tiles above it, in the metric of
   the output's gradients: tr(G E H E^T) has the same form in rows and columns, so the same elimination works for both
   (YAQA, arXiv 2505.22988).
3. Scales. There is one per block: it is first set from the block's mean square, and at the end all scales are fitted
   jointly by least squares in the metric.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reallm.codecs.block_scales import padded, refit_block_scales
from reallm.codecs.encoder import CodedMatrix, EncodingContext
from reallm.codecs.metric import Workspace
from reallm.codecs.packed_fields import to_half
from reallm.kernels.codes.trellis import CODE_STD, CODE_UNIT, pack_states, step_shape
from reallm.kernels.formats.codecs import TILE, TrellisCodec
from reallm.kernels.formats.formats import Feedback
from reallm.system.device import CPU

from .viterbi import closed_walks

GAUSSIAN_ERROR: dict[int, dict[int, float]] = {
    8: {2: 0.305, 3: 0.190, 4: 0.0845, 6: 0.0235, 8: 0.00721, 10: 0.00288, 12: 0.00108},
    10: {2: 0.2885, 3: 0.1555, 4: 0.0779, 5: 0.0483, 6: 0.0205, 8: 0.0055, 10: 0.00169, 12: 0.00058},
    12: {2: 0.2835, 3: 0.1462, 4: 0.0728, 5: 0.041, 6: 0.0191, 8: 0.0051, 10: 0.00139, 12: 0.00043},
}
"""Measured mean squared error on weights from a unit normal distribution, by state bits and width (half bits per
weight). Widths that are worse than a mixture of the next smaller and the next larger width (3.5 bits; 2.5 bits with few
states) are left out."""
SCALES = {2: 0.90, 3: 0.96, 4: 1.05, 5: 1.10, 6: 1.13, 8: 1.20, 10: 1.27, 12: 1.28}
"""Best ratio of the scale to the weights' standard deviation, by width."""
CLIPS = {2: 5.0, 3: 5.2, 4: 4.0, 5: 3.4, 6: 2.6, 8: 1.6, 10: 1.0, 12: 0.6}
"""Upper bound of the distance between a weight and its code in the search, by width, in standard deviations of the
code; the best paths stay below it."""


@dataclass(frozen=True)
class TrellisCodes:
    """The walks, width and scale of every block of columns."""

    walks: list[NDArray[np.uint16]]
    """The states of each block's walks, [tiles down, steps]."""
    widths: list[int]
    """Half bits per weight of each block."""
    scales: Tensor
    """float32 [blocks], rounded to fp16: W_hat is the code times CODE_UNIT times the scale."""


def error_table(state_bits: int) -> dict[int, float]:
    """The row of GAUSSIAN_ERROR for the largest tabulated number of state bits up to `state_bits`."""
    return GAUSSIAN_ERROR[max(bits for bits in GAUSSIAN_ERROR if bits <= state_bits)]


def share_widths(importance: list[float], total: int, state_bits: int) -> list[int]:
    """Assign a width to every block of columns, so that the sum of widths is at most `total` half bits.

    `importance` holds D_b, the factor of each block's error in the cost. The algorithm is greedy on the lower convex
    hull of the error table, which is optimal for every sum that it passes through. Raises ValueError if `total` is too
    small for the smallest widths.
    """
    levels = sorted(error_table(state_bits).items())
    widths, errors = [w for w, _ in levels], [e for _, e in levels]
    chosen, remaining = [0] * len(importance), total - widths[0] * len(importance)
    if remaining < 0:
        raise ValueError(f"{total} half bits are fewer than {widths[0]} for each of {len(importance)} blocks")

    def next_step(block: int) -> tuple[float, int] | None:
        """The heap entry for widening `block`: (minus the gain per half bit, block); None at the largest width."""
        level = chosen[block]
        if level + 1 == len(widths):
            return None
        gain = importance[block] * (errors[level] - errors[level + 1]) / (widths[level + 1] - widths[level])
        return -gain, block

    heap = [step for block in range(len(importance)) if (step := next_step(block))]
    heapq.heapify(heap)
    while heap:
        _, block = heapq.heappop(heap)
        increase = widths[chosen[block] + 1] - widths[chosen[block]]
        if increase > remaining:
            continue
        remaining -= increase
        chosen[block] += 1
        if following := next_step(block):
            heapq.heappush(heap, following)
    return [widths[level] for level in chosen]


class _Encoder:
    """The encoding of one matrix, padded to whole tiles; targets, searches and feedback are on `device`."""

    def __init__(
        self, W: Tensor, codec: TrellisCodec, feedback: Feedback, work: Workspace, device: torch.device = CPU
    ) -> None:
        self.codec, self.shape, self.device = codec, W.shape, device
        self.down, self.across = codec.grid(*W.shape)
        rows, cols = self.down * TILE, self.across * TILE
        self.W = torch.nn.functional.pad(W, (0, cols - W.shape[1], 0, rows - W.shape[0]))
        self.H = padded(work.hessian32, cols)
        self.factor = padded(work.natural_factor, cols) if feedback else None
        G, self.below = work.output_hessian, None
        self.G = None
        if feedback == "ldl2" and G is not None and work.output_factor is not None:
            self.G = padded(G.float(), rows)
            self.below = feedback_below(padded(work.output_factor, rows)).to(device)

    def importance(self) -> list[float]:
        """The cost factor D_b of every block of columns."""
        diagonal = self.H.diagonal() if self.factor is None else self.factor.diagonal().square().reciprocal()
        return diagonal.reshape(-1, TILE).double().log().mean(1).exp().tolist()

    def encode(self) -> tuple[TrellisCodes, Tensor]:
        """Encode the matrix: (codes, decoded matrix [N, K])."""
        widths = share_widths(self.importance(), self.codec.total_width(self.shape[1]), self.codec.state_bits)
        targets, unscaled = self.W.to(self.device, copy=True), torch.zeros_like(self.W, device=self.device)
        factor = None if self.factor is None else self.factor.to(self.device)
        scales, walks = torch.zeros(self.across), []
        for block, width in enumerate(widths):
            span = slice(block * TILE, (block + 1) * TILE)
            target = targets[:, span].contiguous()
            power = float(
                target[: self.shape[0], : self.shape[1] - span.start].square().mean().sqrt()
            )  # without padding
            scale = SCALES[width] * power
            values, states = closed_walks(
                target / (scale or 1.0), self.codec.state_bits, width, CLIPS[width], self.below
            )
            walks.append(states)
            scales[block], unscaled[:, span] = scale, values
            _feed_back(factor, targets, target - scale * values, span)
        unscaled[self.shape[0] :], unscaled[:, self.shape[1] :] = 0, 0  # the decoded padding is not an error
        unscaled = unscaled.cpu()
        stored = to_half(refit_block_scales(self.W, unscaled, scales, self.H, self.G) / (CODE_STD * CODE_UNIT))
        decoded = unscaled * (stored * (CODE_STD * CODE_UNIT)).repeat_interleave(TILE)
        return TrellisCodes(walks, widths, stored), decoded[: self.shape[0], : self.shape[1]]


def _feed_back(factor: Tensor | None, targets: Tensor, error: Tensor, span: slice) -> None:
    """Correct the targets of the columns after `span` for the `error` of the columns in `span`."""
    if factor is None or span.stop == targets.shape[1]:
        return
    whitened = torch.linalg.solve_triangular(factor[span, span], error, upper=True, left=False)
    targets[:, span.stop :].addmm_(whitened, factor[span, span.stop :], alpha=-1)


def feedback_below(factor: Tensor) -> Tensor:
    """The coefficients of feedback between tiles, [tiles, N, TILE], from the output's factor [N, N].

    They multiply the error of each tile; the product is subtracted from the targets of the rows below the tile.
    """
    result = torch.zeros(len(factor) // TILE, len(factor), TILE)
    for tile in range(len(result)):
        span = slice(tile * TILE, (tile + 1) * TILE)
        corner = factor[span, span].T.contiguous()
        below = factor[span, span.stop :].T
        result[tile, span.stop :] = torch.linalg.solve_triangular(corner, below, upper=False, left=False)
    return result


def encode_trellis(W: Tensor, codec: TrellisCodec, context: EncodingContext) -> CodedMatrix:
    """Encode W[N, K] float32 in trellis codes; see `encoder` for the interface."""
    codes, decoded = _Encoder(W, codec, context.fmt.feedback, context.work, context.device).encode()
    bits = [step_shape(width)[1] for width in codes.widths]
    rings = [pack_states(walk, k).reshape(-1) for walk, k in zip(codes.walks, bits, strict=True)]
    words = np.zeros(codec.fields(*W.shape)[0].count, dtype=np.int64)
    used = np.concatenate(rings)
    words[: len(used)] = used
    values = {"words": torch.from_numpy(words), "widths": torch.tensor(codes.widths), "scales": codes.scales}
    return CodedMatrix(values, decoded)
