"""The lattice encoder: nearest words with block error feedback (QuIP#, arXiv 2402.04396).

Groups of 8 columns are coded in storage order. With feedback, each group compensates for the errors of the groups
before it (block LDL on the inverse factor, as in the trellis encoder). Above 2 bits per weight, a second word codes the
residual that the first word leaves. There is one scale per block of TILE columns: it is first set from the block's mean
square, and at the end all scales are fitted jointly by least squares in the metric of H. `ldl2` is treated as `ldl`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reallm.codecs.block_scales import padded, refit_block_scales
from reallm.codecs.encoder import CodedMatrix, EncodingContext
from reallm.codecs.metric import Workspace
from reallm.codecs.packed_fields import to_half
from reallm.kernels.codes.lattice import DIM, RESIDUAL_SCALE
from reallm.kernels.formats.codecs import TILE, LatticeCodec

from .nearest import nearest_e8p, nearest_root

SCALES = {2: 0.96, 3: 1.0, 4: 1.1}
"""Best ratio of the scale to the weights' standard deviation, by bits per weight (measured on normal weights)."""


def nearest_words(x: Tensor, bits: int) -> tuple[list[Tensor], Tensor]:
    """Find the words nearest to x [n, 8] at `bits` bits per weight.

    Returns a list of codes, int64 [n] each (above 2 bits, the second entry holds the residual codes), and the decoded
    vectors, float32 [n, 8].
    """
    codes, words = nearest_e8p(x)
    if bits == 2:
        return [codes], words
    scale = RESIDUAL_SCALE[bits]
    search = nearest_root if bits == 3 else nearest_e8p
    residual_codes, residual_words = search((x - words) / scale)
    return [codes, residual_codes], words + scale * residual_words


class _Encoder:
    """The encoding of one matrix, whose columns are padded to whole blocks."""

    def __init__(self, W: Tensor, codec: LatticeCodec, feedback: bool, work: Workspace) -> None:
        self.codec, self.cols = codec, W.shape[1]
        width = -(-self.cols // TILE) * TILE
        self.W = torch.nn.functional.pad(W, (0, width - self.cols))
        self.H = padded(work.hessian32, width)
        self.factor = padded(work.natural_factor, width) if feedback else None

    def encode(self) -> tuple[list[Tensor], Tensor, Tensor]:
        """Encode the matrix: ([codes, residual codes] [N, groups] each, stored scales [blocks], decoded [N, K])."""
        targets, unscaled, group_codes = self.W.clone(), torch.empty_like(self.W), []
        scales = torch.zeros(self.W.shape[1] // TILE)
        for start in range(0, self.W.shape[1], DIM):
            block, span = start // TILE, slice(start, start + DIM)
            if start % TILE == 0:
                power = float(targets[:, start : start + TILE].square().mean().sqrt())
                scales[block] = SCALES[self.codec.bits] * power
            scale = float(scales[block])
            target = targets[:, span].contiguous()
            codes, unscaled[:, span] = nearest_words(target / (scale or 1.0), self.codec.bits)
            group_codes.append(codes)
            self._feed_back(targets, target - scale * unscaled[:, span], span)
        stored = to_half(refit_block_scales(self.W, unscaled, scales, self.H, None))
        groups = self.codec.group_count(self.cols)
        codes = [torch.stack(column[:groups], 1) for column in zip(*group_codes, strict=True)]
        return codes, stored, (unscaled * stored.repeat_interleave(TILE))[:, : self.cols]

    def _feed_back(self, targets: Tensor, error: Tensor, span: slice) -> None:
        """Correct the targets of the columns after `span` for the `error` of the columns in `span`."""
        if self.factor is None or span.stop == targets.shape[1]:
            return
        whitened = torch.linalg.solve_triangular(self.factor[span, span], error, upper=True, left=False)
        targets[:, span.stop :].addmm_(whitened, self.factor[span, span.stop :], alpha=-1)


def encode_lattice(W: Tensor, codec: LatticeCodec, context: EncodingContext) -> CodedMatrix:
    """Encode W[N, K] float32 in lattice codes; see `encoder` for the interface."""
    codes, scales, decoded = _Encoder(W, codec, bool(context.fmt.feedback), context.work).encode()
    names = ("codes", "residuals")[: len(codes)]
    return CodedMatrix({**dict(zip(names, codes, strict=True)), "scales": scales}, decoded)
