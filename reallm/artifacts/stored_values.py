"""Tensors in the weights files of an artifact: their headers, their bytes, and checks on both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reallm.errors import UserError
from reallm.kernels.codes.stored_fields import check_field, is_finite, plain_values
from reallm.kernels.formats.fields import Field
from reallm.kernels.storage.dtypes import SAFETENSORS_DTYPES
from reallm.kernels.storage.layout import LayoutError
from reallm.kernels.storage.safetensors_reader import StoredTensor, read_folder


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of an artifact's weights files by name, from their headers. Raises UserError."""
    try:
        return read_folder(folder)
    except LayoutError as error:
        raise UserError(str(error)) from None


def check_fields(folder: Path, matrix: str, fields: tuple[Field, ...], tensors: Mapping[str, StoredTensor]) -> None:
    """Raise UserError unless every field of `matrix` is stored as bytes, with its exact size."""
    for field in fields:
        stored = tensors.get(f"{matrix}.{field.name}")
        if stored is None or stored.dtype != "U8" or stored.shape != (field.nbytes,):
            found = "missing" if stored is None else f"{stored.dtype} {list(stored.shape)}"
            raise UserError(f"{folder}: {matrix}.{field.name} is {found}, expected U8 [{field.nbytes}]")


def read_bytes(tensor: StoredTensor) -> NDArray[np.uint8]:
    """The bytes of one stored tensor."""
    with tensor.path.open("rb") as stream:
        stream.seek(tensor.start)
        return np.frombuffer(stream.read(tensor.stop - tensor.start), dtype=np.uint8)


def read_floats(tensor: StoredTensor) -> NDArray[np.floating]:
    """The values of one stored tensor of floats, float16 or float32 [number of elements]; bfloat16 as float32."""
    return plain_values(read_bytes(tensor), SAFETENSORS_DTYPES[tensor.dtype].name)


def check_values(owner: str, fields: list[tuple[Field, NDArray[np.uint8]]], path: Path) -> None:
    """Raise UserError if a field of `owner` in the file `path` has padding that is not zero, NaN or infinity."""
    for field, raw in fields:
        try:
            check_field(field, raw)
        except ValueError as error:
            raise UserError(f"{path}: {owner}: {error}; compile again") from None
        if not is_finite(field, raw):
            raise UserError(f"{path}: {owner}.{field.name} holds NaN or infinity; compile again")
