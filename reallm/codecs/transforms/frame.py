"""The transformed matrix W T that is coded in place of W, the metric of its errors, and the inverse transform.

The transforms are, in order: a scale per column, W diag(s) (AWQ); a permutation of the columns (ReALLM); a rotation of
both sides (QuIP#). An error E' of the transformed matrix is an error E = E' T^-1 of W, so H becomes T^-1 H T^-T, and
the cost is the same before and after the transform.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reallm.codecs.metric import Workspace
from reallm.decoding.rotation import rotate_both, unrotate_both
from reallm.kernels.formats.formats import Format

from .channel_scales import find_channel_scales
from .permutation import similar_columns


@dataclass(frozen=True)
class Frame:
    """A transformed matrix and what is needed to transform it back."""

    weight: Tensor
    """The transformed matrix that the codec encodes, float32 [N, K]."""
    work: Workspace
    """The metric of the transformed matrix."""
    stored: dict[str, Tensor]
    """The values of the transform's fields, by field name."""
    rotated: bool

    def undo(self, decoded: Tensor) -> Tensor:
        """Transform decoded codes [N, K] back to W_hat [N, K], without its sparse and low-rank terms."""
        if self.rotated:
            decoded = unrotate_both(decoded)
        if (order := self.stored.get("permutation")) is not None:
            decoded = decoded[:, order.argsort()]
        if (scales := self.stored.get("channel_scales")) is not None:
            decoded = decoded * scales
        return decoded


def transform(W: Tensor, fmt: Format, work: Workspace) -> Frame:
    """Apply the transforms of `fmt` to W[N, K] float32."""
    stored: dict[str, Tensor] = {}
    if fmt.channel_scales:
        scales = find_channel_scales(W, fmt, work)  # 1 / s, which multiplies decoded columns
        stored["channel_scales"], W = scales, W / scales
        work = _with_hessian(work, work.hessian * scales.double() * scales.double()[:, None])
    if fmt.permuted:
        order = similar_columns(W, fmt, work)
        stored["permutation"], W = order, W[:, order].contiguous()
        work = _with_hessian(work, work.hessian[order][:, order])
    if fmt.rotated:
        W, work = rotate_both(W).contiguous(), work.rotated
    return Frame(W, work, stored, fmt.rotated)


def _with_hessian(work: Workspace, hessian: Tensor) -> Workspace:
    """The workspace after a transform of the columns only: `work` with its Hessian replaced by `hessian`."""
    mean = hessian.diagonal().mean()
    child = Workspace(work.metric, torch.ldexp(hessian, -torch.frexp(mean).exponent), work.output_hessian)
    child.notes = work.notes
    return child
