"""Which tensors of the weights file hold a matrix, to the byte.

- A packed matrix: `<name>.<field>`, U8 [field.nbytes], for each field of its format.
- A matrix in a dense format (bf16, fp16, fp32) keeps the model's own tensor `<name>.weight` [rows, cols], unpadded.
- One slice of an expert stack is named `<stack>.<index>`. When all slices of a stack are in the same dense format the
  model's own parameter `<stack>` [experts, rows, cols] stays; otherwise every slice is packed, dense ones as the field
  `<name>.values`.
- A shared codebook: `reallm_shared.<key>.codebooks`, once.

Every other tensor of the model keeps its name, its shape and the model's dtype.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from reallm.kernels.formats.codecs import FLOAT_NBYTES, DenseCodec
from reallm.kernels.formats.formats import Format
from reallm.kernels.storage.layout import TensorSpec
from reallm.planner.tables.measured_table import Kind, MatrixRecord

FLOAT_TENSOR: Mapping[str, str] = {"f16": "F16", "bf16": "BF16", "f32": "F32"}
DENSE_NAME: Mapping[str, str] = {"f16": "fp16", "bf16": "bf16", "f32": "fp32"}


def dense_nbytes(fmt: Format, rows: int, cols: int) -> int | None:
    """Bytes of a matrix as the model's own tensor; None when the format is not dense."""
    return rows * cols * FLOAT_NBYTES[fmt.codec.dtype] if isinstance(fmt.codec, DenseCodec) else None


def stored_nbytes(fmt: Format, rows: int, cols: int, kind: Kind) -> tuple[int, ...]:
    """Bytes a matrix can take in the file; two values for a dense expert slice, packed first."""
    plain = dense_nbytes(fmt, rows, cols)
    if plain is None:
        return (fmt.nbytes(rows, cols),)
    return (fmt.nbytes(rows, cols), plain) if kind == "expert" else (plain,)


def shared_key(fmt: Format, family: str) -> str | None:
    """Key of the codebook that matrices of `family` share in this format, or None."""
    return f"{fmt.shared_name}@{family}" if fmt.shared_field else None


def shared_tensor(key: str, nbytes: int) -> TensorSpec:
    """The tensor of a shared codebook."""
    return TensorSpec(f"reallm_shared.{re.sub(r'[^A-Za-z0-9_]', '_', key)}.codebooks", "U8", (nbytes,))


def stack_of(matrix: MatrixRecord) -> str | None:
    """The stack an expert slice belongs to, or None."""
    return matrix.name.rpartition(".")[0] if matrix.kind == "expert" else None


def matrix_tensors(matrix: MatrixRecord, fmt: Format) -> tuple[TensorSpec, ...]:
    """The tensors of one matrix; an expert slice always packed (see `whole_stacks` for the exception)."""
    if isinstance(fmt.codec, DenseCodec) and matrix.kind != "expert":
        return (TensorSpec(f"{matrix.name}.weight", FLOAT_TENSOR[fmt.codec.dtype], (matrix.rows, matrix.cols)),)
    fields = fmt.fields(matrix.rows, matrix.cols)
    return tuple(TensorSpec(f"{matrix.name}.{field.name}", "U8", (field.nbytes,)) for field in fields)


def whole_stacks(matrices: Iterable[MatrixRecord], formats: Mapping[str, Format]) -> dict[str, list[MatrixRecord]]:
    """Stacks whose slices all have one and the same dense format, with their slices."""
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


def weights_tensors(
    matrices: Iterable[MatrixRecord],
    formats: Mapping[str, Format],
    shared: Mapping[str, int],
    other_tensors: Mapping[str, tuple[int, ...]],
    dtype: str,
) -> list[TensorSpec]:
    """Every tensor of the weights file; `formats` names one for every matrix, `shared` maps keys to bytes."""
    matrices = list(matrices)
    whole = whole_stacks(matrices, formats)
    tensors = [TensorSpec(name, FLOAT_TENSOR[dtype], tuple(shape)) for name, shape in other_tensors.items()]
    tensors += [shared_tensor(key, nbytes) for key, nbytes in shared.items()]
    for stack, slices in whole.items():
        codec = formats[slices[0].name].codec
        assert isinstance(codec, DenseCodec)
        tensors.append(TensorSpec(stack, FLOAT_TENSOR[codec.dtype], (len(slices), slices[0].rows, slices[0].cols)))
    for matrix in matrices:
        if stack_of(matrix) not in whole:
            tensors += matrix_tensors(matrix, formats[matrix.name])
    return tensors
