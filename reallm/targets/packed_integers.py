"""The packed integers of an artifact, as the writers of all engines need them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reallm.artifacts.directory import read_record_of
from reallm.artifacts.stored_values import check_fields, read_bytes
from reallm.errors import UserError
from reallm.kernels.codes.packing import unpack_codes
from reallm.kernels.formats.codecs import ScalarCodec
from reallm.kernels.formats.formats import Format
from reallm.kernels.storage.safetensors_reader import StoredTensor
from reallm.planner.tables.plan import Plan, read_plan

TypeOf = Callable[[Format, int, int], str | None]


@dataclass(frozen=True)
class PackedMatrix:
    """One matrix [rows, cols] of an artifact in plain integers: value = step * (code - zero)."""

    name: str
    bits: int
    group: int
    """Weights in a group along the row."""
    codes: NDArray[np.uint8]
    """[rows, cols]"""
    steps: NDArray[np.float16]
    """[rows, cols / group]"""
    zeros: NDArray[np.uint8] | None
    """Zero points [rows, cols / group]; None stands for 2^(bits - 1)."""

    def decoded(self) -> NDArray[np.float32]:
        """The values, float32 [rows, cols]."""
        zeros = np.uint8(1 << (self.bits - 1)) if self.zeros is None else self.zeros.repeat(self.group, axis=1)
        levels = self.codes.astype(np.float32) - np.asarray(zeros, dtype=np.float32)
        result: NDArray[np.float32] = levels * self.steps.astype(np.float32).repeat(self.group, axis=1)
        return result


@dataclass(frozen=True)
class PackedArtifact:
    """An artifact all of whose packed matrices one engine holds."""

    folder: Path
    tensors: Mapping[str, StoredTensor]
    plan: Plan
    tied: Mapping[str, str]
    """Head module -> the packed embedding that it uses."""
    types: Mapping[str, str]
    """Packed matrix -> the engine's name of its type."""
    formats: Mapping[str, Format]
    """Packed matrix -> format."""

    def dense(self) -> Iterator[tuple[str, StoredTensor]]:
        """The tensors that are not fields of packed matrices."""
        fields = {f"{name}.{field.name}" for name, fmt in self.formats.items() for field in fmt.fields(1, 1)}
        return ((name, tensor) for name, tensor in self.tensors.items() if name not in fields)

    def matrix(self, name: str) -> PackedMatrix:
        """One packed matrix. Raises UserError if an engine's scale cannot be exact in fp16."""
        shapes = {choice.matrix: (choice.rows, choice.cols) for choice in self.plan.choices}
        (rows, cols), fmt = shapes[name], self.formats[name]
        codec = fmt.codec
        assert isinstance(codec, ScalarCodec)
        stored = {field.name: field for field in fmt.fields(rows, cols)}
        check_fields(self.folder, name, tuple(stored.values()), self.tensors)
        raw = {field: read_bytes(self.tensors[f"{name}.{field}"]) for field in stored}
        codes = unpack_codes(raw["codes"], codec.bits, rows * cols).astype(np.uint8).reshape(rows, cols)
        groups = codec.group_count(cols)
        scales = raw["scales"].view("<f2")[: rows * groups].reshape(rows, groups)
        if codec.table == "uint":
            zeros = unpack_codes(raw["zeros"], codec.bits, rows * groups).astype(np.uint8).reshape(rows, groups)
            return PackedMatrix(name, codec.bits, codec.group_width(cols), codes, scales, zeros)
        half = np.float32(1 << (codec.bits - 1))
        steps = (scales.astype(np.float32) / half).astype(np.float16)
        if not np.array_equal(steps.astype(np.float32) * half, scales.astype(np.float32)):
            raise UserError(
                f"{name} in {fmt.name}: a scale is too small for the engine's fp16 scale, which is {half:g} times "
                "smaller; keep this matrix in another format (--pin) or with --exclude"
            )
        return PackedMatrix(name, codec.bits, codec.group_width(cols), codes, steps, None)


def read_packed(folder: Path, tensors: Mapping[str, StoredTensor], type_of: TypeOf, engine: str) -> PackedArtifact:
    """The packed matrices of the artifact in `folder`. Raises UserError if `engine` cannot hold one of them."""
    record, plan = read_record_of(folder), read_plan(folder)
    shapes = {choice.matrix: (choice.rows, choice.cols) for choice in plan.choices}
    types, refused = {}, []
    formats = dict(record.matrices())
    for name, fmt in formats.items():
        found = type_of(fmt, *shapes[name]) if name in shapes and f"{name}.codes" in tensors else None
        if found is None or any(c.matrix == name and c.kind == "expert" for c in plan.choices):
            refused.append((name, fmt.name))
        else:
            types[name] = found
    if refused:
        name, fmt_name = refused[0]
        raise UserError(
            f"{engine} cannot hold {len(refused)} of the {len(formats)} packed matrices, such as {name} in {fmt_name}; "
            f"plan with --target {engine}"
        )
    if not types:
        raise UserError(f"{folder} has no packed matrix to export")
    return PackedArtifact(folder, tensors, plan, record.tied, types, formats)


def bit_stream(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    """Pack the rows of `codes` [N, K] as little-endian streams: code i at bit i * bits; uint32 [N, ceil(K bits / 32)].

    >>> bit_stream(np.array([[1, 2, 3]], dtype=np.uint8), 4)
    array([[801]], dtype=uint32)
    """
    rows, cols = codes.shape
    result = np.zeros((rows, -(-cols * bits // 32)), dtype="<u4")
    for start in range(0, rows, 256):  # the bits apart take 8 times the memory
        part = codes[start : start + 256]
        flat = np.unpackbits(part[:, :, None], axis=2, count=bits, bitorder="little").reshape(len(part), -1)
        packed = np.packbits(flat, axis=1, bitorder="little")
        result[start : start + 256].view(np.uint8).reshape(len(part), -1)[:, : packed.shape[1]] = packed
    return result


def unpacked_stream(words: NDArray[np.uint32], bits: int, cols: int) -> NDArray[np.uint8]:
    """The codes [N, cols] in rows of words [N, M], by shifts; independent of `bit_stream`, for reading files back."""
    positions = np.arange(cols, dtype=np.int64) * bits
    first, shift = positions // 32, (positions % 32).astype(np.uint64)
    padded = np.concatenate([words, np.zeros((len(words), 1), dtype=words.dtype)], axis=1).astype(np.uint64)
    joined = padded[:, first] | (padded[:, first + 1] << np.uint64(32))
    return ((joined >> shift) & np.uint64((1 << bits) - 1)).astype(np.uint8)
