"""How far products of native kernels may be from those with the float64 reference."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from reallm.kernels.formats.codecs import AdditiveCodec, KMeansCodec, LatticeCodec, ScalarCodec, TrellisCodec
from reallm.kernels.formats.formats import Format
from reallm.kernels.reference import read_field

UNIT = 2.0**-24


def product_bound(fmt: Format, packed: Mapping[str, NDArray[np.uint8]], rows: int, cols: int) -> float:
    """The largest error of an entry of W_hat x in float32, for |x|_2 = 1.

    A sum of n products is off by at most n u sum |w_j x_j| <= n u |w|_2 |x|_2, u = 2^-24 (Higham, Accuracy and
    Stability, 3.1, and Cauchy-Schwarz), with n = K for the codes, K + N for both rotations (which keep norms, so that
    an error of C R_K x spreads over all rows at most as the Frobenius norm says), the rank, and 64 for what happens to
    one weight. |w| counts what is added before it cancels: a code and its zero, bytes of a product and their mean.

    One row of x is rounded to 16 bits and levels to 15 (scalar_dot.hpp), apart from each other and evenly within h =
    2^-16 of the largest x of a group, or 2^-15 of the largest level: over n u w.x at six standard deviations, h |w|_2
    |x|_2 / sqrt(3) each, that is 2700 u. Counted where |w| is what it is, the largest level; of other codes it is four
    times as large as a weight or more, which has room for it.
    """
    rounded = 2700 if _levels_in_registers(fmt) else 0
    return (cols + rows + 64 + _rank(fmt) + rounded) * UNIT * _largest(fmt, packed, rows, cols) * (rows * cols) ** 0.5


def _levels_in_registers(fmt: Format) -> bool:
    codec = fmt.codec
    if isinstance(codec, ScalarCodec):
        return codec.table not in ("int", "uint") and codec.bits <= 4
    return isinstance(codec, KMeansCodec) and codec.bits <= 4


def _rank(fmt: Format) -> int:
    return fmt.low_rank.rank if fmt.low_rank else 0


def _largest(fmt: Format, packed: Mapping[str, NDArray[np.uint8]], rows: int, cols: int) -> float:
    stored = fmt.fields(rows, cols) + ((fmt.shared_field,) if fmt.shared_field else ())
    most = {f.name: float(np.abs(read_field(f, packed)).max(initial=0)) for f in stored}
    scale = most.get("scales", 1.0) + most.get("scale_min", 0.0) + most.get("scale_ranges", 0.0)
    codec, code = fmt.codec, most.get("levels", most.get("values", 1.0))
    if isinstance(codec, ScalarCodec):
        code = {"uint": 2.0 ** (codec.bits + 1), "int": 4.0}.get(codec.table, 1.0)
    elif isinstance(codec, AdditiveCodec):
        code = codec.num_codebooks * most["codebooks"]
    elif isinstance(codec, TrellisCodec):
        code = 2 * 1020 / 128
    elif isinstance(codec, LatticeCodec):
        code = 2 * 2.75
    total = scale * code * most.get("channel_scales", 1.0) + most.get("sparse_values", 0.0)
    factors = most.get("left", 0.0) * most.get("right", 0.0)
    return total + _rank(fmt) * factors * most.get("left_scales", 1.0) * most.get("right_scales", 1.0)
