"""Binding of arguments: the tensors that the kernels of one product read and write, by name.

`begin_product` checks x, y, bias and the stored fields once, before any kernel reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reallm.codegen.ir.operations import CodegenError
from reallm.kernels.formats.fields import Field
from reallm.kernels.formats.formats import Format

from .derived_tensors import Derived, derive

if TYPE_CHECKING:
    import torch

VECTOR_BYTES = 16
"""Alignment of all tensors that kernels load from."""


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix W[rows, cols] with its stored fields; the attributes are described at `launch.multiply`."""

    format: Format
    fields: Mapping[str, torch.Tensor]
    rows: int
    cols: int
    bias: torch.Tensor | None = None
    derived: Derived | None = None
    """The result of `derive` for the same fields; computed when needed if None."""


@dataclass
class ProductCall:
    """One product in progress: the tensors that its kernels read and write, by name."""

    rows: int
    cols: int
    tensors: dict[str, torch.Tensor]
    rank: int
    widths: tuple[int, ...]
    splits: int = 1
    """Number of kernel instances among which the columns are divided."""
    filled: bool = True
    """Whether every block of a trellis has a width other than 0."""
    shared: dict[Any, Any] = field(default_factory=dict)
    """Results for the same x that other products can use; see `input_cache`."""

    @property
    def count(self) -> int:
        """The number of rows of x."""
        return self.tensors["x"].shape[0]

    def new(self, *shape: int) -> torch.Tensor:
        """An uninitialised float32 tensor on the device of x."""
        import torch

        return self.tensors["x"].new_empty(shape, dtype=torch.float32)


def begin_product(matrix: StoredMatrix, x: torch.Tensor, y: torch.Tensor) -> ProductCall:
    """Check the arguments of y = x W_hat^T (+ bias) and return them as a ProductCall; launches no product kernel.

    Raises CodegenError on a wrong shape, dtype or device.
    """
    fmt, rows, cols = matrix.format, matrix.rows, matrix.cols
    _check_activations(x, y, rows, cols, matrix.bias)
    flat = x.reshape(-1, cols).contiguous()
    flat = flat.clone() if flat.data_ptr() % VECTOR_BYTES else flat  # kernels load eight bytes at once
    tensors = {"x": flat, "y": y, **_field_views(fmt, matrix.fields, rows, cols, x.device)}
    if matrix.bias is not None:
        tensors["bias"] = matrix.bias.to(x.dtype).contiguous()
    derived = derive(fmt, matrix.fields, rows, cols) if matrix.derived is None else matrix.derived
    rank = fmt.low_rank.rank if fmt.low_rank else 0
    return ProductCall(
        rows, cols, tensors | derived.tensors, rank, derived.widths, filled=derived.filled, shared=input_cache(x)
    )


def input_cache(x: torch.Tensor) -> dict[Any, Any]:
    """Results that belong to x and that its products with several matrices can use, such as its rotation.

    The cache lives as long as x and is emptied when x is changed in place. In inference mode torch does not count
    changes, so nothing is kept.
    """
    if x.is_inference():
        return {}
    version, results = getattr(x, "_reallm_kept", (None, {}))
    if version != x._version:
        results = {}
        x._reallm_kept = (x._version, results)  # type: ignore[attr-defined]
    return results


def _field_views(
    fmt: Format, fields: Mapping[str, torch.Tensor], rows: int, cols: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Each stored field as a tensor of its element type (codes as 32-bit words); sizes and devices are checked."""
    stored = fmt.fields(rows, cols) + ((fmt.shared_field,) if fmt.shared_field else ())
    return {field.name: _field_view(field, fields, device) for field in stored}


def _field_view(field: Field, fields: Mapping[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    import torch

    raw = fields.get(field.name)
    if raw is None or raw.dtype != torch.uint8 or raw.shape != (field.nbytes,) or raw.device != device:
        found = "nothing" if raw is None else f"{raw.dtype} {tuple(raw.shape)} on {raw.device}"
        raise CodegenError(f"field {field.name!r}: found {found}, expected torch.uint8 ({field.nbytes},) on {device}")
    dtypes = {"f16": torch.float16, "f32": torch.float32, "i8": torch.int8}
    dtype = torch.int32 if field.dtype[0] == "u" else dtypes[field.dtype]
    ready = raw.is_contiguous() and raw.data_ptr() % VECTOR_BYTES == 0
    return (raw if ready else raw.clone(memory_format=torch.contiguous_format)).view(dtype)


def _check_activations(x: torch.Tensor, y: torch.Tensor, rows: int, cols: int, bias: torch.Tensor | None) -> None:
    """Raise CodegenError unless x, y and bias fit a matrix [rows, cols]."""
    import torch

    if x.ndim == 0 or x.shape[-1] != cols or x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise CodegenError(f"x: found {x.dtype} {tuple(x.shape)}, expected fp16, bf16 or fp32 [..., {cols}]")
    fits = y.shape == (*x.shape[:-1], rows) and y.dtype == x.dtype and y.device == x.device and y.is_contiguous()
    if not fits:
        raise CodegenError(f"out: found {y.dtype} {tuple(y.shape)}, expected contiguous {x.dtype} [..., {rows}]")
    if bias is not None and (bias.shape != (rows,) or bias.device != x.device):
        raise CodegenError(f"bias: found {tuple(bias.shape)} on {bias.device}, expected ({rows},) on {x.device}")
