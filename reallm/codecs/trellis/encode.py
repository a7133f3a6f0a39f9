"""The trellis encoder: bits assigned to blocks of columns, block error feedback, Viterbi search of every tile (QTIP).

1. Bits. With H^-1 = U^T U, a block b of 16 columns costs D_b times the code's error, log D_b = -2 mean log U_jj. The
   geometric mean of D is that of the determinant, in whatever order the columns stand. Reverse water-filling assigns
   the widths: from the narrowest one, the block that gains most per bit is widened repeatedly.
2. Codes. Blocks are coded in storage order, each compensating for the errors of the blocks before it (block LDL; QuIP#,
   arXiv 2402.04396). With two-sided feedback a tile also compensates for the tiles above it, in the metric of the
   output's gradients: tr(G E H E^T) separates, so the same elimination serves both sides (YAQA, arXiv 2505.22988).
3. Scales. One per block, first set from the block's power, finally all fitted jointly by least squares in the metric.
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

from .viterbi import closed_walks

GAUSSIAN_ERROR: dict[int, dict[int, float]] = {
    8: {2: 0.305, 3: 0.190, 4: 0.0845, 6: 0.0235, 8: 0.00721, 10: 0.00288, 12: 0.00108},
    10: {2: 0.2885, 3: 0.1555, 4: 0.0779, 5: 0.0483, 6: 0.0205, 8: 0.0055, 10: 0.00169, 12: 0.00058},
    12: {2: 0.2835, 3: 0.1462, 4: 0.0728, 5: 0.041, 6: 0.0191, 8: 0.0051, 10: 0.00139, 12: 0.00043},
}
"""Measured mean squared error of a unit normal source, by state bits and width (half bits per weight). Widths that a
mixture of their two neighbours would beat (3.5 bits; 2.5 bits with few states) are left out."""
SCALES = {2: 0.90, 3: 0.96, 4: 1.05, 5: 1.10, 6: 1.13, 8: 1.20, 10: 1.27, 12: 1.28}
"""Best ratio of the scale to the source's standard deviation, by width."""
CLIPS = {2: 5.0, 3: 5.2, 4: 4.0, 5: 3.4, 6: 2.6, 8: 1.6, 10: 1.0, 12: 0.6}
"""Upper bound of a distance in the search, in standard deviations of the code; no surviving path gets that far."""


@dataclass(frozen=True)
class TrellisCodes:
    """The walks, width and scale of every block of columns."""

    walks: list[NDArray[np.uint16]]
    """The states of each block's walks, [tiles down, steps]."""
    widths: list[int]
    """Half bits per weight of each block."""
    scales: Tensor
    """float32 [blocks], in fp16 values: W_hat is the code times CODE_UNIT times the scale."""


def error_table(state_bits: int) -> dict[int, float]:
    """The row of GAUSSIAN_ERROR for the largest tabulated number of state bits up to `state_bits`."""
    return GAUSSIAN_ERROR[max(bits for bits in GAUSSIAN_ERROR if bits <= state_bits)]


def share_widths(importance: list[float], total: int, state_bits: int) -> list[int]:
    """Assign widths to blocks of columns, at most `total` half bits in sum.

    `importance` is the factor by which each block's error counts. Greedy on the lower convex hull of the error table,
    which is optimal for every total that it passes through. Raises ValueError if `total` is below the least widths.
    """
    levels = sorted(error_table(state_bits).items())
    widths, errors = [w for w, _ in levels], [e for _, e in levels]
    chosen, remaining = [0] * len(importance), total - widths[0] * len(importance)
    if remaining < 0:
        raise ValueError(f"{total} half bits are fewer than {widths[0]} for each of {len(importance)} blocks")

    def next_step(block: int) -> tuple[float, int] | None:
        """(minus the gain per half bit, block), to be taken from a heap; None at the largest width."""
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
    """One matrix, padded to whole tiles."""

    def __init__(self, W: Tensor, codec: TrellisCodec, feedback: Feedback, work: Workspace) -> None:
        self.codec, self.shape = codec, W.shape
        self.down, self.across = codec.grid(*W.shape)
        rows, cols = self.down * TILE, self.across * TILE
        self.W = torch.nn.functional.pad(W, (0, cols - W.shape[1], 0, rows - W.shape[0]))
        self.H = padded(work.hessian32, cols)
        self.factor = padded(work.natural_factor, cols) if feedback else None
        G, self.below = work.output_hessian, None
        self.G = None
        if feedback == "ldl2" and G is not None and work.output_factor is not None:
            self.G = padded(G.float(), rows)
            self.below = feedback_below(padded(work.output_factor, rows))

    def importance(self) -> list[float]:
        """The cost factor D of every block of columns."""
        diagonal = self.H.diagonal() if self.factor is None else self.factor.diagonal().square().reciprocal()
        return diagonal.reshape(-1, TILE).double().log().mean(1).exp().tolist()

    def encode(self) -> tuple[TrellisCodes, Tensor]:
        """(codes, what they decode to [N, K])."""
        widths = share_widths(self.importance(), self.codec.total_width(self.shape[1]), self.codec.state_bits)
        targets, unscaled = self.W.clone(), torch.zeros_like(self.W)
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
            self._feed_back(targets, target - scale * values, span)
        unscaled[self.shape[0] :], unscaled[:, self.shape[1] :] = 0, 0  # the decoded padding is not an error
        stored = to_half(refit_block_scales(self.W, unscaled, scales, self.H, self.G) / (CODE_STD * CODE_UNIT))
        decoded = unscaled * (stored * (CODE_STD * CODE_UNIT)).repeat_interleave(TILE)
        return TrellisCodes(walks, widths, stored), decoded[: self.shape[0], : self.shape[1]]

    def _feed_back(self, targets: Tensor, error: Tensor, span: slice) -> None:
        """Add the correction for the error of the columns `span` to the targets of the columns behind them."""
        if self.factor is None or span.stop == targets.shape[1]:
            return
        corner = self.factor[span, span]
        whitened = torch.linalg.solve_triangular(corner, error, upper=True, left=False)
        targets[:, span.stop :].addmm_(whitened, self.factor[span, span.stop :], alpha=-1)


def feedback_below(factor: Tensor) -> Tensor:
    """What the error of each tile takes off the rows below it: [tiles, N, TILE], from the output's factor [N, N]."""
    result = torch.zeros(len(factor) // TILE, len(factor), TILE)
    for tile in range(len(result)):
        span = slice(tile * TILE, (tile + 1) * TILE)
        corner = factor[span, span].T.contiguous()
        below = factor[span, span.stop :].T
        result[tile, span.stop :] = torch.linalg.solve_triangular(corner, below, upper=False, left=False)
    return result


def encode_trellis(W: Tensor, codec: TrellisCodec, context: EncodingContext) -> CodedMatrix:
    """Encode W[N, K] float32 in trellis codes; see `encoder` for the interface."""
    codes, decoded = _Encoder(W, codec, context.fmt.feedback, context.work).encode()
    bits = [step_shape(width)[1] for width in codes.widths]
    rings = [pack_states(walk, k).reshape(-1) for walk, k in zip(codes.walks, bits, strict=True)]
    words = np.zeros(codec.fields(*W.shape)[0].count, dtype=np.int64)
    used = np.concatenate(rings)
    words[: len(used)] = used
    values = {"words": torch.from_numpy(words), "widths": torch.tensor(codes.widths), "scales": codes.scales}
    return CodedMatrix(values, decoded)
