"""The error bound of products of native kernels relative to the float64 reference."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from reallm.kernels.codes.stored_fields import read_field
from reallm.kernels.formats.codecs import AdditiveCodec, KMeansCodec, LatticeCodec, ScalarCodec, TrellisCodec
from reallm.kernels.formats.formats import Format

UNIT = 2.0**-24


def product_bound(fmt: Format, packed: Mapping[str, NDArray[np.uint8]], rows: int, cols: int) -> float:
    """The largest error of an entry of W_hat x in float32, for |x|_2 = 1.

    The error of a sum of n products is at most n u sum |w_j x_j| <= n u |w|_2 |x|_2, u = 2^-24 (Higham, Accuracy and
    Stability, 3.1, and Cauchy-Schwarz), with n = K for the codes, K + N for both rotations (which preserve norms, so
    that an error of C R_K x spreads over all rows by at most the Frobenius norm), the rank, and 64 for the operations
    on one weight. |w| is the sum of magnitudes before cancellation: a code and its zero, bytes of a product and their
    mean.

    One row of x is rounded to 16 bits and levels to 15 (scalar_dot.hpp). These errors are independent and uniform
    within h = 2^-16 of the largest x of a group, or 2^-15 of the largest level. Six standard deviations, each h |w|_2
    |x|_2 / sqrt(3), add 2700 u to n u. They are added where |w| is the largest level itself; for other codes |w| is at
    least four times as large as a weight, which leaves room for them.
    """
    rounded = 2700 if _levels_in_registers(fmt) else 0
    return (cols + rows + 64 + _rank(fmt) + rounded) * UNIT * _largest(fmt, packed, rows, cols) * (rows * cols) ** 0.5


def _levels_in_registers(fmt: Format) -> bool:
    """Whether the kernel looks codes up in a table of rounded levels."""
    codec = fmt.codec
    if isinstance(codec, ScalarCodec):
        return codec.table not in ("int", "uint") and codec.bits <= 4
    return isinstance(codec, KMeansCodec) and codec.bits <= 4


def _rank(fmt: Format) -> int:
    return fmt.low_rank.rank if fmt.low_rank else 0


def _largest(fmt: Format, packed: Mapping[str, NDArray[np.uint8]], rows: int, cols: int) -> float:
    """Upper bound of |w| for any weight."""
    stored = fmt.fields(rows, cols) + ((fmt.shared_field,) if fmt.shared_field else ())
    peak = {f.name: float(np.abs(read_field(f, packed)).max(initial=0)) for f in stored}
    scale = peak.get("scales", 1.0) + peak.get("scale_min", 0.0) + peak.get("scale_ranges", 0.0)
    codec, code = fmt.codec, peak.get("levels", peak.get("values", 1.0))
    if isinstance(codec, ScalarCodec):
        code = {"uint": 2.0 ** (codec.bits + 1), "int": 4.0}.get(codec.table, 1.0)
    elif isinstance(codec, AdditiveCodec):
        code = codec.num_codebooks * peak["codebooks"]
    elif isinstance(codec, TrellisCodec):
        code = 2 * 1020 / 128
    elif isinstance(codec, LatticeCodec):
        code = 2 * 2.75
    total = scale * code * peak.get("channel_scales", 1.0) + peak.get("sparse_values", 0.0)
    factors = peak.get("left", 0.0) * peak.get("right", 0.0)
    return total + _rank(fmt) * factors * peak.get("left_scales", 1.0) * peak.get("right_scales", 1.0)
