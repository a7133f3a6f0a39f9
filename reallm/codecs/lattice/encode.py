"""The lattice encoder: block error feedback and the nearest words (QuIP#, arXiv 2402.04396).

Blocks of 8 columns in storage order, each after the errors of those before it were spread onto it (block LDL on the
inverse factor, as the trellis does). A residual word is the nearest to what the first left. Scales: one a block of TILE
columns, first from the block's power, at last all together by least squares in the metric. `ldl2` is taken as `ldl`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reallm.codecs.block_scales import padded, refit_block_scales
from reallm.codecs.metric import Workspace
from reallm.codecs.packed_fields import to_half
from reallm.kernels.codes.lattice import DIM, RESIDUAL_SCALE
from reallm.kernels.formats.codecs import TILE, LatticeCodec
from reallm.kernels.formats.formats import Feedback

from .nearest import nearest_e8p, nearest_root

SCALES = {2: 0.96, 3: 1.0, 4: 1.1}
"""Best ratio of the scale to the source's deviation, by bits (measured on a normal source)."""


def nearest_words(x: Tensor, bits: int) -> tuple[list[Tensor], Tensor]:
    """(codes and, over 2 bits, residual codes, int64 [n] each; what they stand for, float32 [n, 8]) for x [n, 8]."""
    codes, words = nearest_e8p(x)
    if bits == 2:
        return [codes], words
    scale = RESIDUAL_SCALE[bits]
    search = nearest_root if bits == 3 else nearest_e8p
    second, rest = search((x - words) / scale)
    return [codes, second], words + scale * rest


class _Encoder:
    """One matrix, its columns padded to whole blocks."""

    def __init__(self, W: Tensor, codec: LatticeCodec, feedback: bool, work: Workspace) -> None:
        self.codec, self.cols = codec, W.shape[1]
        width = -(-self.cols // TILE) * TILE
        self.W = torch.nn.functional.pad(W, (0, width - self.cols))
        self.H = padded(work.hessian32, width)
        self.factor = padded(work.natural_factor, width) if feedback else None

    def encode(self) -> tuple[list[Tensor], Tensor, Tensor]:
        """(codes and residual codes [N, groups], stored scales [blocks], what they decode to [N, K])."""
        targets, plain, found = self.W.clone(), torch.empty_like(self.W), []
        scales = torch.zeros(self.W.shape[1] // TILE)
        for start in range(0, self.W.shape[1], DIM):
            block, span = start // TILE, slice(start, start + DIM)
            if start % TILE == 0:
                power = float(targets[:, start : start + TILE].square().mean().sqrt())
                scales[block] = SCALES[self.codec.bits] * power
            scale = float(scales[block])
            target = targets[:, span].contiguous()
            codes, plain[:, span] = nearest_words(target / (scale or 1.0), self.codec.bits)
            found.append(codes)
            self._spread(targets, target - scale * plain[:, span], span)
        stored = to_half(refit_block_scales(self.W, plain, scales, self.H, None))
        groups = self.codec.group_count(self.cols)
        codes = [torch.stack(column[:groups], 1) for column in zip(*found, strict=True)]
        return codes, stored, (plain * stored.repeat_interleave(TILE))[:, : self.cols]

    def _spread(self, targets: Tensor, error: Tensor, span: slice) -> None:
        if self.factor is None or span.stop == targets.shape[1]:
            return
        whitened = torch.linalg.solve_triangular(self.factor[span, span], error, upper=True, left=False)
        targets[:, span.stop :].addmm_(whitened, self.factor[span, span.stop :], alpha=-1)


def encode_lattice(
    W: Tensor, codec: LatticeCodec, feedback: Feedback, work: Workspace
) -> tuple[dict[str, Tensor], Tensor]:
    """(fields, what they decode to [N, K]) for W[N, K] float32."""
    codes, scales, decoded = _Encoder(W, codec, bool(feedback), work).encode()
    names = ("codes", "residuals")[: len(codes)]
    return {**dict(zip(names, codes, strict=True)), "scales": scales}, decoded
