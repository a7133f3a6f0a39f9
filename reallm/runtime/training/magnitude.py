"""The magnitude of rows beside their direction, trained with the low-rank factors and kept as a gain: DoRA.

    y = m o (V x) / ||V||_row        V = W(codes) + L R        m [rows] trainable, ||V||_row at first

As in DoRA (arXiv 2402.09353, section 4.3) the norm follows V but is a constant in the backward pass:
dy/dm = V x / ||V||_row, and the gradients of L and R are those of a plain term times m / ||V||_row. What is left after
training is the gain g = m / ||V||_row.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from reallm.kernels.formats.formats import Format
from reallm.runtime.packed import DecodeMode

from .scales import ScaleTraining

LEAST_NORM = 2.0**-100
"""A row of zeros has no direction; its gain is then m over this, and its product 0 whatever m is."""


class MagnitudeTraining(ScaleTraining):
    """A packed matrix whose rows may have a gain, trained as a magnitude beside the low-rank term."""

    magnitude: nn.Parameter | None

    def start_decoding(self, mode: DecodeMode, dtype: torch.dtype) -> None:
        """As for every packed matrix; nothing is being trained yet."""
        super().start_decoding(mode, dtype)
        self.register_parameter("magnitude", None)

    def set_gain(self, gain: Tensor | None) -> None:
        """Multiply the rows of W_hat by a copy of `gain` [rows] from now on; None: no longer."""
        values = None if gain is None else gain.detach().to(torch.float32, copy=True).contiguous()
        self.gain_bytes = None if values is None else values.view(torch.uint8)

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """||V||_row, float32 [rows], with the factors as they are now and without the gain."""
        if self.left_factor is None or self.right_factor is None:
            direction = self.decode_stored(torch.float32)
        else:
            direction = torch.addmm(self.dense(torch.float32), self.left_factor, self.right_factor)
        norms: Tensor = torch.linalg.vector_norm(direction, dim=1)
        return norms

    @torch.no_grad()
    def magnitudes(self) -> Tensor:
        """m, float32 [rows]: the norms of W_hat's rows, with the sign of their gain."""
        if self.magnitude is not None:
            return self.magnitude.detach().clone()
        return self.row_norms() if self.gain is None else self.row_norms() * self.gain

    def set_magnitudes(self, magnitudes: Tensor) -> None:
        """Give the rows of W_hat the norms `magnitudes` [rows]. Raises ValueError if a gain is not finite."""
        gain = magnitudes.detach() / self.row_norms().clamp(min=LEAST_NORM)
        if not bool(gain.isfinite().all()):
            raise ValueError("a magnitude is not finite beside the norm of its row")
        self.set_gain(gain)

    def train_magnitude(self) -> nn.Parameter:
        """Make m trainable, float32 [rows], from the norms that the rows have.

        Raises ValueError unless the factors are being trained, and nothing else.
        """
        if self.left_factor is None or self._values_in_training:
            raise ValueError("a magnitude is trained beside low-rank factors alone; call train_low_rank() first")
        self.magnitude = nn.Parameter(self.magnitudes())
        self.set_gain(None)
        return self.magnitude

    def fold(self, dtype: Literal["f16", "i8", "i4"] | None = None) -> Format:
        """As for the factors; a trained magnitude becomes the gain, in memory only. Raises ValueError."""
        trained, self.magnitude = self.magnitude, None
        result = super().fold(dtype)
        if trained is not None:
            self.set_magnitudes(trained)
        return result

    def revert(self, fmt: Format, fields: dict[str, Tensor]) -> None:
        """Give up whatever is being trained and any gain, and take on a format and its fields."""
        self.magnitude = None
        self.set_gain(None)
        super().revert(fmt, fields)

    def training_output(self, inputs: Tensor) -> Tensor:
        """x W_hat^T for x [..., cols], with what is being trained in it: [..., rows]."""
        result = super().training_output(inputs)
        gain = self.gain
        if self.magnitude is not None:
            gain = self.magnitude / self.row_norms().clamp(min=LEAST_NORM)
        return result if gain is None else (result.float() * gain).to(result.dtype)
