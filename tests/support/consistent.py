"""Random fields whose values cannot be chosen freely: permutations, trellis widths, sparse positions, decoders."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from reallm.kernels.codes.neural import pack_tensors
from reallm.kernels.codes.packing import pack_codes, pad
from reallm.kernels.formats.codecs import NeuralCodec, TrellisCodec
from reallm.kernels.formats.formats import Format

WIDTHS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12)


def consistent_fields(fmt: Format, rows: int, cols: int, rng: np.random.Generator) -> dict[str, NDArray[np.uint8]]:
    """The fields of `fmt` whose values cannot be chosen freely, as packed bytes."""
    fields: dict[str, NDArray[np.uint8]] = {}
    if fmt.permuted:
        fields["permutation"] = pack_codes(rng.permutation(cols), 16)
    if fmt.channel_scales:
        fields["channel_scales"] = pad(rng.uniform(0.5, 2, cols).astype("<f2").tobytes())
    if fmt.sparse:
        positions = np.sort(rng.choice(rows * cols, fmt.sparse.count(rows, cols), replace=False))
        fields["sparse_counts"] = pack_codes(np.bincount(positions // cols, minlength=rows), 16)
        fields["sparse_cols"] = pack_codes(positions % cols, 16)
    if isinstance(fmt.codec, NeuralCodec):
        fields["codebooks"] = pad(random_decoder(fmt.codec, rng).tobytes())
    if isinstance(fmt.codec, TrellisCodec):
        remaining, widths = fmt.codec.total_width(cols), []
        for _ in range(fmt.codec.grid(rows, cols)[1]):
            allowed = [w for w in WIDTHS if w <= remaining and (w if w % 2 else w // 2) <= fmt.codec.state_bits]
            widths.append(int(rng.choice(allowed)))
            remaining -= widths[-1]
        fields["widths"] = pack_codes(np.array(widths), 4)
        count = fmt.fields(rows, cols)[0].count
        fields["words"] = pad(rng.integers(0, 1 << 32, count, dtype=np.uint32).astype("<u4").tobytes())
    return fields


def random_decoder(codec: NeuralCodec, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A decoder whose layers keep values near one, as those of trained decoders do."""
    return pack_tensors(codec, [rng.uniform(-1, 1, shape) / np.sqrt(shape[-1]) for shape, _ in codec.tensors])
