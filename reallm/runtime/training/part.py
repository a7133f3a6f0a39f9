"""The parts of one packed matrix that are being trained, and the product computed with their current values.

    y = m o (T(codes * (scales * gain)) x + L R x) / ||V||_row

- T: permutation, column scales, rotation and outliers, as stored
- L [rows, rank], R [rank, cols]: the low-rank term, in place of the stored one (LQ-LoRA, arXiv 2311.12023)
- gain: a factor for each stored scale, 1 at the start (AQLM, arXiv 2401.06118; OmniQuant, arXiv 2308.13137)
- the values that the codes index (`codebook`)
- m [rows]: magnitudes of the rows (DoRA, arXiv 2402.09353), only together with the low-rank term. ||V||_row, the norms
  of the rows of V = W(codes) + L R, change with the factors but are constants in the backward pass (section 4.3 of that
  paper). So dy/dm = V x / ||V||_row, and the gradients of L and R are those without DoRA times m / ||V||_row.

Whatever is not being trained comes from the stored fields.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from reallm.decoding.decode import decode_factors
from reallm.runtime.packed import Packed
from reallm.runtime.row_magnitudes import MIN_NORM

from .codebook import TrainedCodebook
from .scaled_product import ScaledProduct


class TrainingPart(nn.Module):
    """The parameters of a packed linear module that are being trained; a child of that module while there are any."""

    left_factor: nn.Parameter | None
    """L, float32 [rows, rank]."""
    right_factor: nn.Parameter | None
    """R, float32 [rank, cols]."""
    scale_gain: nn.Parameter | None
    """A factor for each stored scale, float32 [count]."""
    magnitude: nn.Parameter | None
    """m, float32 [rows]."""
    codebook: TrainedCodebook | None
    """The codebook in training, if it belongs to this matrix alone."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("left_factor", "right_factor", "scale_gain", "magnitude"):
            self.register_parameter(name, None)
        self.register_module("codebook", None)
        self.stored_scales: Tensor | None = None
        """The scales that `scale_gain` multiplies, float32 [count]; not a buffer, so it is not saved."""
        self._shared_codebook: tuple[TrainedCodebook, ...] = ()  # a tuple, so that torch does not make it a child
        self.scaled_product = ScaledProduct()

    @property
    def trained_codebook(self) -> TrainedCodebook | None:
        """The codebook in training, which is the matrix's own or shared with other matrices; None if there is none."""
        return self._shared_codebook[0] if self._shared_codebook else self.codebook

    def set_codebook(self, codebook: TrainedCodebook | None, shared: bool = False) -> None:
        """Train the values of `codebook` from now on; None ends the training of a codebook."""
        self.codebook = None if shared else codebook
        self._shared_codebook = (codebook,) if shared and codebook is not None else ()
        self.scaled_product.drop_cache()

    @property
    def trains_values(self) -> bool:
        """Whether scales or a codebook are being trained."""
        return self.scale_gain is not None or self.trained_codebook is not None

    @property
    def is_idle(self) -> bool:
        """Whether no parameter is being trained."""
        return self.left_factor is None and self.magnitude is None and not self.trains_values

    def output(self, matrix: Packed, inputs: Tensor) -> Tensor:
        """x W_hat^T, [..., rows], for x [..., cols], with the current values of everything that is being trained."""
        if not self.trains_values:
            result = linear(inputs, matrix.dense(inputs.dtype))
        else:
            scales, codebook = self._current_scales(), self.trained_codebook
            result = self.scaled_product(matrix, inputs, scales, None if codebook is None else codebook())
            if self.left_factor is None and matrix.format.low_rank:
                left, right = decode_factors(matrix.format, matrix.fields, matrix.rows, matrix.cols)
                result = result + linear(linear(inputs, right.to(inputs.dtype)), left.to(inputs.dtype))
        if self.left_factor is not None and self.right_factor is not None:
            inner = linear(inputs, self.right_factor.to(inputs.dtype))
            result = result + linear(inner, self.left_factor.to(inputs.dtype))
        gain = matrix.gain
        if self.magnitude is not None:
            gain = self.magnitude / self.row_norms(matrix).clamp(min=MIN_NORM)
        return result if gain is None else (result.float() * gain).to(result.dtype)

    def _current_scales(self) -> Tensor | None:
        if self.scale_gain is None or self.stored_scales is None:
            return None
        return self.stored_scales * self.scale_gain

    @torch.no_grad()
    def row_norms(self, matrix: Packed) -> Tensor:
        """||V||_row, float32 [rows], with the factors in training and without the gain; there must be such factors."""
        assert self.left_factor is not None and self.right_factor is not None
        direction = torch.addmm(matrix.dense(torch.float32), self.left_factor, self.right_factor)
        norms: Tensor = torch.linalg.vector_norm(direction, dim=1)
        return norms
