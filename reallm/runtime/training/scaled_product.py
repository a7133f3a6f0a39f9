"""The product of a packed matrix whose scales or codebook are being trained.

    y = T(codes * scales) x         T: permutation, column scales, rotation and outliers

Where all rows share their scales, as in rotated trellis codes, the scales multiply the rotated input instead, so that
the gradient of a whole weight is never formed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from reallm.decoding.decode import decode_transform
from reallm.decoding.rotation import rotate, unrotate
from reallm.decoding.scales import decode_scales, decode_unscaled, scale_count, spread_scales
from reallm.kernels.formats.codecs import AdditiveCodec, KMeansCodec, ScalarCodec
from reallm.kernels.formats.formats import Format
from reallm.runtime.packed import Packed


class ScaledProduct:
    """Computes x (T(codes * scales))^T, without the low-rank term. Keeps the decoded codes in decode mode "load"."""

    def __init__(self) -> None:
        self._codes: Tensor | None = None

    def drop_cache(self) -> None:
        """Forget the decoded codes; call this when fields or the codebook change."""
        self._codes = None

    def __call__(self, matrix: Packed, inputs: Tensor, scales: Tensor | None, codebook: Tensor | None) -> Tensor:
        """The product [..., rows] of the matrix and x [..., cols].

        `scales` and `codebook`, float32 [count], are used in place of the stored scales and the stored codebook; None
        means the stored values.
        """
        fmt, codes = matrix.format, self._unscaled_codes(matrix, codebook).to(inputs.dtype)
        spread = _spread_scales(matrix, scales).to(inputs.dtype)
        if _scales_inputs(fmt):
            return linear((rotate(inputs) if fmt.rotated else inputs) * spread, codes)
        weight = decode_transform(fmt, matrix.fields, matrix.rows, matrix.cols, (codes * spread).float())
        return linear(inputs, weight.to(inputs.dtype))

    def _unscaled_codes(self, matrix: Packed, codebook: Tensor | None) -> Tensor:
        """The decoded values before scaling, [rows, cols].

        With `_scales_inputs`, the rotation of the rows is already undone, so that the product needs only that of x.
        """
        fmt, fields, shared = matrix.format, matrix.fields, matrix.shared_codebooks
        if codebook is not None:
            return decode_unscaled(fmt, fields, matrix.rows, matrix.cols, shared=shared, codebook=codebook)
        if self._codes is not None:
            return self._codes
        with torch.inference_mode(False), torch.no_grad():
            codes = decode_unscaled(fmt, fields, matrix.rows, matrix.cols, shared=shared)
            if _scales_inputs(fmt) and fmt.rotated:
                codes = unrotate(codes.T.contiguous()).T.contiguous()
            codes = codes.to(matrix.decoded.dtype)
        if matrix.mode == "load":
            self._codes = codes
        return codes


def _spread_scales(matrix: Packed, scales: Tensor | None) -> Tensor:
    """The scales in a shape that broadcasts with the decoded codes; a scalar 1 for a format without scales."""
    fmt, rows, cols = matrix.format, matrix.rows, matrix.cols
    if scale_count(fmt, rows, cols) == 0:
        return torch.ones((), device=matrix.decoded.device)
    if scales is None:
        scales = decode_scales(fmt, matrix.fields, rows, cols)
    return spread_scales(fmt, scales, rows, cols)


def _scales_inputs(fmt: Format) -> bool:
    """Whether the scales can multiply the (rotated) input, so that no scaled weight has to be formed."""
    by_row = isinstance(fmt.codec, ScalarCodec | AdditiveCodec | KMeansCodec)
    return not (by_row or fmt.sparse or fmt.permuted or fmt.channel_scales)
