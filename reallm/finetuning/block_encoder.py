"""Encodes the weights of a model, block by block, in the formats of its artifact."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from reallm.codecs.encode import encode
from reallm.codecs.metric import Workspace
from reallm.codecs.packed_fields import PackedFields
from reallm.kernels.formats.codecs import DenseCodec
from reallm.measurement.encoding import codebook_values
from reallm.measurement.measured_codes import MeasuredCodes
from reallm.models.loaded import LoadedModel, Matrix
from reallm.runtime.install import packed_modules
from reallm.runtime.packed import Packed
from reallm.system.threads import one_thread

from .student_teacher import StudentTeacher


class BlockEncoder:
    """Encodes the matrices of a model in the formats of its artifact, and writes the codes into the student."""

    def __init__(self, pair: StudentTeacher, measured: Path) -> None:
        self.job = MeasuredCodes(measured, pair.dense).job
        self.packed: dict[str, Packed] = dict(packed_modules(pair.student))
        self.matrices = sorted(
            (m for m in pair.dense.matrices if m.name in self.packed), key=lambda m: (-m.numel, m.name)
        )
        self.blocks = sorted({matrix.block for matrix in self.matrices if matrix.block is not None})

    def of_block(self, block: int | None) -> list[Matrix]:
        """The packed matrices of block number `block` (None: those outside all blocks), the largest first."""
        return [matrix for matrix in self.matrices if matrix.block == block]

    def encode_block(self, loaded: LoadedModel, block: int) -> dict[str, Tensor]:
        """Encode the matrices of `block` from their weights in `loaded`; return the decoded weights [rows, cols] by
        name.

        An expert that is stored as plain floats is not encoded and keeps its values.
        """
        matrices = [m for m in self.of_block(block) if not isinstance(self.packed[m.name].format.codec, DenseCodec)]
        with one_thread(), ThreadPoolExecutor(os.cpu_count()) as pool:
            encoded = pool.map(partial(self._encode, loaded), matrices)
            for matrix, fields in zip(matrices, encoded, strict=True):
                self.write(matrix.name, {name: torch.from_numpy(value) for name, value in fields.items()})
        return {matrix.name: self.decoded(matrix.name) for matrix in self.of_block(block)}

    def _encode(self, loaded: LoadedModel, matrix: Matrix) -> PackedFields:
        packed = self.packed[matrix.name]
        fmt, raw = packed.format, packed.shared_codebooks
        books = None
        if raw is not None and fmt.shared_field is not None:
            books = codebook_values(fmt, {fmt.shared_field.name: raw.cpu().numpy()})
        work = Workspace(self.job.metric(matrix))
        return encode(loaded.weight(matrix).cpu(), fmt, work, shared=books, seed=self.job.seed)

    def write(self, name: str, fields: Mapping[str, Tensor]) -> None:
        """Write fields into the packed matrix called `name`."""
        packed = self.packed[name]
        packed.write((field, raw.to(packed.decoded.device)) for field, raw in fields.items())

    def decoded(self, name: str) -> Tensor:
        """W_hat [rows, cols] of a packed matrix, float32."""
        return self.packed[name].decode_now(torch.float32)
