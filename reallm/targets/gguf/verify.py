"""Check that a written GGUF file holds an artifact's weights and, apart from them, what its base holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reallm.errors import UserError

from .blocks import decode_blocks
from .contents import Contents
from .file_header import GgufHeader, GgufTensor, read_gguf_header
from .types import TYPE_IDS


def verify_gguf(path: Path, base: GgufHeader, contents: Contents) -> None:
    """Read the file `path` back: packed matrices decode bit for bit as in reallm, all else equals the base.

    Raises UserError that names the first tensor for which this does not hold.
    """
    header = read_gguf_header(path)
    if header.pairs != base.pairs or [t.name for t in header.tensors] != [t.name for t in base.tensors]:
        raise UserError(f"{path} does not have the key-values and tensors of {base.path}; the disk may be faulty")
    for old, new in zip(base.tensors, header.tensors, strict=True):
        raw, matrix = _bytes_of(header, new), contents.matrices.get(new.name)
        if matrix is None:
            same = (old.type_id, old.shape) == (new.type_id, new.shape) and np.array_equal(raw, _bytes_of(base, old))
        else:
            decoded = decode_blocks(matrix.type_name, raw, matrix.rows, matrix.cols)
            expected = matrix.weight(contents.stored)[contents.orders[new.name]]
            same = new.type_id == TYPE_IDS[matrix.type_name] and np.array_equal(
                decoded.view(np.uint32), expected.view(np.uint32)
            )
        if not same:
            raise UserError(f"{path}: {new.name} was written, but reads back differently; the disk may be faulty")


def _bytes_of(header: GgufHeader, tensor: GgufTensor) -> NDArray[np.uint8]:
    return np.memmap(header.path, dtype=np.uint8, mode="r", offset=tensor.start, shape=(tensor.nbytes,))
