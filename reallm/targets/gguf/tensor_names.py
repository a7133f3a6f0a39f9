"""Which tensor of a GGUF file a tensor of a transformers model is, and in which order it has the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reallm.errors import UserError

from .file_header import GgufHeader, GgufTensor

SUFFIXES = (".weight", ".bias")
HEAD_COUNTS = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}
"""Tensor whose rows a converter may reorder -> the key with its number of heads, after the architecture's name."""


def gguf_package() -> Any:
    """The package gguf. Raises UserError if it is not installed."""
    try:
        import gguf
        import gguf.quants
        import gguf.tensor_mapping
    except ImportError:
        raise UserError("writing a GGUF file needs the package gguf; pip install 'reallm[gguf]'") from None
    return gguf


def name_finder(base: GgufHeader) -> Callable[[str], str | None]:
    """The function from a transformers tensor, such as model.norm.weight, to its name in `base`, or None.

    Raises UserError for an architecture that the package gguf does not know.
    """
    gguf = gguf_package()
    name, architectures = base.values.get("general.architecture"), gguf.MODEL_ARCH_NAMES
    known = next((arch for arch, text in architectures.items() if text == name), None)
    blocks = base.values.get(f"{name}.block_count")
    if known is None or not isinstance(blocks, int):
        raise UserError(
            f"{base.path} has architecture {name!r} and {blocks} blocks; expected an architecture that the package "
            "gguf knows; pip install --upgrade gguf"
        )
    mapping = gguf.get_tensor_name_map(known, blocks)
    present = {tensor.name for tensor in base.tensors}

    def find(tensor: str) -> str | None:
        found = mapping.get_name(tensor, try_suffixes=SUFFIXES)
        return found if found in present else None

    return find


def base_values(base: GgufHeader, tensor: GgufTensor) -> NDArray[np.float32]:
    """The values of a tensor of `base`, float32 in its shape. Raises UserError if the package gguf cannot decode it."""
    gguf = gguf_package()
    raw = np.memmap(base.path, dtype=np.uint8, mode="r", offset=tensor.start, shape=(tensor.nbytes,))
    try:
        values = gguf.quants.dequantize(
            np.asarray(raw).reshape(*tensor.shape[:-1], -1), gguf.GGMLQuantizationType(tensor.type_id)
        )
    except (ValueError, NotImplementedError) as error:
        raise UserError(
            f"{base.path}: {tensor.name} cannot be decoded ({error}); give the model as F16, BF16 or Q8_0"
        ) from None
    return np.asarray(values, dtype=np.float32).reshape(tensor.shape)


def row_orders(values: Mapping[str, object], tensor: GgufTensor) -> dict[str, NDArray[np.int64]]:
    """The orders in which a converter may have written the rows of `tensor`: row i is row order[i] of transformers.

    Rows of q and k of llama models are rearranged within each head: from the first half of the rotary embedding before
    the second to pairs that alternate. `values` are the key-values of the file.
    """
    rows = tensor.shape[0]
    orders = {"unchanged": np.arange(rows)}
    key = HEAD_COUNTS.get(tensor.name.split(".")[-2])
    heads = values.get(f"{values.get('general.architecture')}.{key}") if key else None
    if isinstance(heads, int) and heads > 0 and rows % (2 * heads) == 0:
        orders["rotary pairs"] = np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
    return orders


def relative_error(values: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Norm of the difference relative to the norm of `expected`; 0 if both are zero."""
    difference, size = float(np.linalg.norm(values - expected)), float(np.linalg.norm(expected))
    if not np.isfinite(difference):
        return float("inf")
    return difference / size if size else (float("inf") if difference else 0.0)
