"""The packed matrices of an artifact, and their bytes in a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from reallm.artifacts.find import is_saved_copy
from reallm.artifacts.quantization_config import QuantizationRecord
from reallm.artifacts.saved_copy import copied_matrices
from reallm.artifacts.stored_values import check_fields, check_values, read_bytes
from reallm.decoding.decode import decode
from reallm.errors import UserError
from reallm.kernels.codes.packing import unpack_codes
from reallm.kernels.formats.codecs import ScalarCodec
from reallm.kernels.formats.formats import Format
from reallm.kernels.storage.safetensors_reader import StoredTensor
from reallm.planner.tables.plan import read_plan

from .blocks import Bytes, encode_blocks
from .types import ACCEPTED, gguf_type


@dataclass(frozen=True)
class PackedMatrix:
    """A packed matrix of an artifact and the tensor that it becomes."""

    name: str
    stored_as: str
    """What the names of its fields begin with."""
    format: Format
    rows: int
    cols: int
    type_name: str

    def fields(self, tensors: Mapping[str, StoredTensor]) -> dict[str, Bytes]:
        """Field name -> bytes."""
        fields = self.format.fields(self.rows, self.cols)
        return {field.name: read_bytes(tensors[f"{self.stored_as}.{field.name}"]) for field in fields}

    def weight(self, tensors: Mapping[str, StoredTensor]) -> NDArray[np.float32]:
        """The weight as reallm decodes it, float32 [rows, cols]."""
        fields = {name: torch.from_numpy(raw.copy()) for name, raw in self.fields(tensors).items()}
        weight: NDArray[np.float32] = decode(self.format, fields, self.rows, self.cols).numpy()
        return weight

    def blocks(self, tensors: Mapping[str, StoredTensor], order: NDArray[np.int64]) -> Bytes:
        """The bytes of the tensor with rows in `order`. Raises UserError for a scale that fp16 cannot hold halved."""
        codec, fields = self.format.codec, self.fields(tensors)
        assert isinstance(codec, ScalarCodec)
        codes = unpack_codes(fields["codes"], codec.bits, self.rows * self.cols).reshape(self.rows, self.cols)
        groups = codec.group_count(self.cols)
        scales = fields["scales"].view("<f2")[: self.rows * groups].reshape(self.rows, groups)
        half = np.float32(1 << (codec.bits - 1))
        d = (scales.astype(np.float32) / half).astype(np.float16)
        exact = (d.astype(np.float32) * half == scales) & np.isfinite(d)
        if not exact.all():
            raise UserError(
                f"{self.name}: {int((~exact).sum())} scales, the first {float(scales[~exact][0]):g}, divided by "
                f"{half:g} are not fp16 numbers, as {self.type_name} needs; pin another format for this matrix"
            )
        return encode_blocks(self.type_name, codes[order], d[order])


def packed_matrices(folder: Path, stored: Mapping[str, StoredTensor], record: QuantizationRecord) -> list[PackedMatrix]:
    """The packed matrices of an artifact. Raises UserError if GGUF cannot hold one of them."""
    if is_saved_copy(folder):
        found = [(m.name, m.stored_as, m.format, m.rows, m.cols) for m in copied_matrices(folder, stored)]
    else:
        shapes = {choice.matrix: (choice.rows, choice.cols) for choice in read_plan(folder).choices}
        if absent := [name for name, _ in record.matrices() if name not in shapes]:
            raise UserError(f"{folder}: its plan does not list {absent[0]}; copy the artifact again")
        found = [(name, name, fmt, *shapes[name]) for name, fmt in record.matrices()]
    types = [gguf_type(fmt, rows, cols) for _, _, fmt, rows, cols in found]
    if wrong := [matrix for matrix, type_name in zip(found, types, strict=True) if type_name is None]:
        name, _, fmt, rows, cols = wrong[0]
        raise UserError(
            f"{name} [{rows}, {cols}] is in {fmt.name}, which no GGUF type holds, as are {len(wrong)} of {len(found)} "
            f"matrices; expected {ACCEPTED}, with columns a multiple of 32: give --space these formats"
        )
    result = []
    for (name, stored_as, fmt, rows, cols), type_name in zip(found, types, strict=True):
        check_fields(folder, stored_as, fmt.fields(rows, cols), stored)
        matrix = PackedMatrix(name, stored_as, fmt, rows, cols, str(type_name))
        raws = matrix.fields(stored)
        check_values(name, [(field, raws[field.name]) for field in fmt.fields(rows, cols)], folder)
        result.append(matrix)
    return result
