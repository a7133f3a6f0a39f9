"""Which tensors of the weights file hold a matrix, and their exact sizes.

- A packed matrix has one tensor `<name>.<field>`, U8 [field.nbytes], for each field of its format.
- A matrix in a dense format (bf16, fp16, fp32) keeps the model's own tensor `<name>.weight` [rows, cols], unpadded.
- One slice of an expert stack is named `<stack>.<index>`. When all slices of a stack are in the same dense format the
  model's own parameter `<stack>` [experts, rows, cols] stays. Otherwise every slice is packed, dense ones as the field
  `<name>.values`.
- A shared codebook is stored once, as `reallm_shared.<key>.codebooks`.

Every other tensor of the model keeps its name, its shape and its dtype.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from reallm.kernels.formats.codecs import DenseCodec
from reallm.kernels.formats.formats import Format
from reallm.kernels.storage.dtypes import DTYPES
from reallm.kernels.storage.layout import TensorSpec

from .measured_table import Kind, MatrixRecord

SHARED_PREFIX = "reallm_shared."
"""What the names of the tensors of shared codebooks begin with."""


def dense_nbytes(fmt: Format, rows: int, cols: int) -> int | None:
    """Bytes of a matrix [rows, cols] stored as the model's own tensor; None when the format is not dense."""
    return DTYPES[fmt.codec.dtype].nbytes(rows * cols) if isinstance(fmt.codec, DenseCodec) else None


def stored_nbytes(fmt: Format, rows: int, cols: int, kind: Kind) -> tuple[int, ...]:
    """The byte counts that a matrix can have in the file.

    A dense expert slice has two: its size when packed, and its size as a part of an unpacked stack. Any other matrix
    has one.
    """
    unpacked = dense_nbytes(fmt, rows, cols)
    if unpacked is None:
        return (fmt.nbytes(rows, cols),)
    return (fmt.nbytes(rows, cols), unpacked) if kind == "expert" else (unpacked,)


def shared_key(fmt: Format, family: str) -> str | None:
    """Key of the codebook that matrices of `family` share in this format, or None."""
    return f"{fmt.shared_name}@{family}" if fmt.shared_field else None


def shared_tensor(key: str, nbytes: int) -> TensorSpec:
    """The tensor of a shared codebook."""
    return TensorSpec(f"{SHARED_PREFIX}{re.sub(r'[^A-Za-z0-9_]', '_', key)}.codebooks", "U8", (nbytes,))


def stack_of(matrix: MatrixRecord) -> str | None:
    """The stack that an expert slice belongs to; None for other matrices."""
    return matrix.name.rpartition(".")[0] if matrix.kind == "expert" else None


def matrix_tensors(matrix: MatrixRecord, fmt: Format) -> tuple[TensorSpec, ...]:
    """The tensors of one matrix in format `fmt`. Expert slices are taken as packed; `whole_stacks` finds the others."""
    if isinstance(fmt.codec, DenseCodec) and matrix.kind != "expert":
        return (TensorSpec(f"{matrix.name}.weight", DTYPES[fmt.codec.dtype].safetensors, (matrix.rows, matrix.cols)),)
    fields = fmt.fields(matrix.rows, matrix.cols)
    return tuple(TensorSpec(f"{matrix.name}.{field.name}", "U8", (field.nbytes,)) for field in fields)


def whole_stacks(matrices: Iterable[MatrixRecord], formats: Mapping[str, Format]) -> dict[str, list[MatrixRecord]]:
    """Stack -> its slices, for stacks stored as one unpacked tensor because all slices have the same dense format."""
    stacks: dict[str, list[MatrixRecord]] = defaultdict(list)
    for matrix in matrices:
        if (stack := stack_of(matrix)) is not None:
            stacks[stack].append(matrix)
    return {
        stack: slices
        for stack, slices in stacks.items()
        if len({(formats[m.name], m.rows, m.cols) for m in slices}) == 1
        and isinstance(formats[slices[0].name].codec, DenseCodec)
    }


def matrices_nbytes(matrices: Iterable[MatrixRecord], formats: Mapping[str, Format]) -> dict[str, int]:
    """Matrix name -> its bytes in the file, headers excluded; `formats` maps the name to the matrix's format.

    `matrices` must hold all slices of every stack in it: whether a dense slice is packed depends on the other slices.
    """
    matrices = list(matrices)
    unpacked_stacks = whole_stacks(matrices, formats)
    sizes = {}
    for matrix in matrices:
        fmt = formats[matrix.name]
        packed, *unpacked = stored_nbytes(fmt, matrix.rows, matrix.cols, matrix.kind)
        sizes[matrix.name] = unpacked[0] if stack_of(matrix) in unpacked_stacks else packed
    return sizes


def other_specs(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str], dtype: str) -> list[TensorSpec]:
    """The tensors that are not matrices: name -> shape, and name -> dtype of those that are not in the model's `dtype`.

    >>> other_specs({"norm": (8,), "bias": (2,)}, {"bias": "f32"}, "bf16")[1]
    TensorSpec(name='bias', dtype='F32', shape=(2,))
    """
    return [TensorSpec(n, DTYPES[dtypes.get(n, dtype)].safetensors, tuple(shape)) for n, shape in shapes.items()]


def weights_tensors(
    matrices: Iterable[MatrixRecord],
    formats: Mapping[str, Format],
    shared: Mapping[str, int],
    others: Iterable[TensorSpec],
) -> list[TensorSpec]:
    """Every tensor of the weights file.

    `formats` holds a format for every matrix, `shared` the bytes of every shared codebook by its key, and `others` the
    tensors that are not matrices (`other_specs`).
    """
    matrices = list(matrices)
    unpacked_stacks = whole_stacks(matrices, formats)
    tensors = [*others, *(shared_tensor(key, nbytes) for key, nbytes in shared.items())]
    for stack, slices in unpacked_stacks.items():
        codec = formats[slices[0].name].codec
        assert isinstance(codec, DenseCodec)
        tensors.append(
            TensorSpec(stack, DTYPES[codec.dtype].safetensors, (len(slices), slices[0].rows, slices[0].cols))
        )
    for matrix in matrices:
        if stack_of(matrix) not in unpacked_stacks:
            tensors += matrix_tensors(matrix, formats[matrix.name])
    return tensors
