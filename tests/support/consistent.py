"""Random fields that must agree with each other: permutations, widths of trellis blocks, positions, decoders."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from reallm.kernels.codes.neural import pack_tensors
from reallm.kernels.codes.packing import pack_codes, pad
from reallm.kernels.formats.codecs import NeuralCodec, TrellisCodec
from reallm.kernels.formats.formats import Format

WIDTHS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12)


def consistent_fields(fmt: Format, rows: int, cols: int, rng: np.random.Generator) -> dict[str, NDArray[np.uint8]]:
    """The fields of `fmt` whose values are not free, as packed bytes."""
    found: dict[str, NDArray[np.uint8]] = {}
    if fmt.permuted:
        found["permutation"] = pack_codes(rng.permutation(cols), 16)
    if fmt.channel_scales:
        found["channel_scales"] = pad(rng.uniform(0.5, 2, cols).astype("<f2").tobytes())
    if fmt.sparse:
        where = np.sort(rng.choice(rows * cols, fmt.sparse.count(rows, cols), replace=False))
        found["sparse_counts"] = pack_codes(np.bincount(where // cols, minlength=rows), 16)
        found["sparse_cols"] = pack_codes(where % cols, 16)
    if isinstance(fmt.codec, NeuralCodec):
        found["codebooks"] = pad(random_decoder(fmt.codec, rng).tobytes())
    if isinstance(fmt.codec, TrellisCodec):
        left, widths = fmt.codec.total_width(cols), []
        for _ in range(fmt.codec.grid(rows, cols)[1]):
            allowed = [w for w in WIDTHS if w <= left and (w if w % 2 else w // 2) <= fmt.codec.state_bits]
            widths.append(int(rng.choice(allowed)))
            left -= widths[-1]
        found["widths"] = pack_codes(np.array(widths), 4)
        count = fmt.fields(rows, cols)[0].count
        found["words"] = pad(rng.integers(0, 1 << 32, count, dtype=np.uint32).astype("<u4").tobytes())
    return found


def random_decoder(codec: NeuralCodec, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A decoder whose layers keep values near one, as trained ones do."""
    return pack_tensors(codec, [rng.uniform(-1, 1, shape) / np.sqrt(shape[-1]) for shape, _ in codec.tensors])
