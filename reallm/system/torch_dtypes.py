"""The torch equivalents of the element types in `kernels.storage.dtypes`, by their short names."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from reallm.kernels.storage.dtypes import FloatName

FLOAT_DTYPES: Mapping[FloatName, torch.dtype] = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
"""The types that weights and activations may have, by short name."""
FLOAT_NAMES: Mapping[torch.dtype, FloatName] = {dtype: name for name, dtype in FLOAT_DTYPES.items()}
TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "i8": torch.int8,
    **{str(name): dtype for name, dtype in FLOAT_DTYPES.items()},
}
"""The types of all fields that hold plain numbers instead of codes, by short name."""

TORCH_NAMES: Mapping[torch.dtype, str] = {
    **{dtype: name for name, dtype in TORCH_DTYPES.items()},
    **{torch.bool: "bool", torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64"},
    torch.float64: "f64",
}
"""The short names of all types that the tensors of an artifact may have."""


def torch_name(dtype: torch.dtype) -> str:
    """The name of `dtype` in torch, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
