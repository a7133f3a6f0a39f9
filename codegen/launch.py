"""Running generated kernels: y = W_hat x on the device that holds the fields.

The source that runs is always the one the installed package generates from the format, kept in the user's cache and
compiled by Triton on first use. Code that came with an artifact is never executed; `check_sources` only compares it.
With TRITON_INTERPRET=1, set before Triton is imported, the same calls run on the CPU.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from reallm.kernels.codecs import Field
from reallm.kernels.formats import Format
from reallm.kernels.tables import TableName, table
from reallm.planner.records import write_text_atomic

from .emit import emit, pointers
from .operations import CodegenError, Levels
from .passes import run_passes
from .program import KernelSpec, MatrixProgram, Program, Tile, lower

if TYPE_CHECKING:
    import torch

MAX_BATCH = 4
"""Rows of x one instance takes; more of them become more instances."""


@cache
def kernels_for(
    fmt: Format, rows: int, cols: int, bias: bool = False, tile: Tile | None = None
) -> tuple[KernelSpec, ...]:
    """The kernels, in order, that compute y = W_hat x for a matrix [rows, cols] stored as `fmt`.

    `tile` replaces the one of `passes.tile_for`. Raises CodegenError for a dense format.
    """
    program = Program((MatrixProgram("matrix", rows, cols, fmt, lower(fmt, bias), tile),))
    return run_passes(program).matrices[0].kernels


def cache_folder() -> Path:
    """Where generated sources are kept: $REALLM_CACHE, else $XDG_CACHE_HOME/reallm, else ~/.cache/reallm."""
    chosen = os.environ.get("REALLM_CACHE")
    base = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reallm"
    return base / "kernels"


@cache
def load_kernel(spec: KernelSpec) -> Any:
    """The Triton function of `spec`, from a source file in the user's cache that is written anew if it differs."""
    text = emit(spec)
    digest = hashlib.sha256(text.encode()).hexdigest()
    path = cache_folder() / f"{spec.name}-{digest[:16]}.py"
    if not path.is_file() or path.read_bytes() != text.encode():
        write_text_atomic(path, text)
    return getattr(_import(path, f"reallm_generated_{digest[:16]}"), spec.function)


def _import(path: Path, name: str) -> ModuleType:
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise CodegenError(f"{path} cannot be imported; remove it and try again")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def gemv(
    fmt: Format,
    fields: Mapping[str, torch.Tensor],
    x: torch.Tensor,
    rows: int,
    cols: int,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """y = x W_hat^T (+ bias) with generated kernels: [..., rows] in the dtype of x [..., cols], summed in float32.

    `fields` holds each of `fmt.fields(rows, cols)` (and a shared codebook under its field's name) as uint8
    [field.nbytes] on the device of x. `out`, contiguous and of the result's shape, is filled if given; `tile` is for
    tuning. Meant for few rows of x: the codes are decoded once for every MAX_BATCH of them. Raises CodegenError on a
    wrong shape, dtype or device, and for a dense format.
    """
    import torch

    y = torch.empty((*x.shape[:-1], rows), dtype=x.dtype, device=x.device) if out is None else out
    _check_call(x, y, rows, cols, bias)
    flat = x.reshape(-1, cols).contiguous()
    tensors = {"x": flat, "y": y, **_views(fmt, fields, rows, cols, x.device)}
    if bias is not None:
        tensors["bias"] = bias.to(x.dtype).contiguous()
    if flat.shape[0]:
        with torch.cuda.device(x.device.index if x.is_cuda else -1):
            for spec in kernels_for(fmt, rows, cols, bias is not None, tile):
                _run(spec, tensors, fmt, rows, cols)
    return y


def _run(spec: KernelSpec, tensors: dict[str, torch.Tensor], fmt: Format, rows: int, cols: int) -> None:
    """Launch one kernel over all rows of x; a projection leaves its t among `tensors`."""
    import torch

    x = tensors["x"]
    count = x.shape[0]
    if spec.function == "project":
        rank = fmt.low_rank.rank if fmt.low_rank else 0
        tensors["t"] = torch.empty((count, rank), dtype=torch.float32, device=x.device)
        grid: tuple[int, int] = (rank, count)
        sizes: tuple[int, ...] = (rank, cols)
    else:
        spec = replace(spec, batch=min(count, MAX_BATCH))
        grid, sizes = (-(-rows // spec.tile.block_n), -(-count // spec.batch)), (count, rows, cols)
        for operation in spec.operations:
            if isinstance(operation, Levels):
                tensors["levels"] = _levels(operation.table, operation.bits, x.device)
    arguments = [tensors[name] for name, _ in pointers(spec)]
    load_kernel(spec)[grid](*arguments, *sizes, num_warps=spec.tile.num_warps, enable_fp_fusion=True)


@cache
def _levels(name: TableName, bits: int, device: torch.device) -> torch.Tensor:
    import torch

    return torch.from_numpy(table(name, bits).copy()).to(device)


def _views(
    fmt: Format, fields: Mapping[str, torch.Tensor], rows: int, cols: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Each field as a tensor of what it holds (codes as 32-bit words), its size and device checked."""
    stored = fmt.fields(rows, cols) + ((fmt.shared_field,) if fmt.shared_field else ())
    return {field.name: _view(field, fields, device) for field in stored}


def _view(field: Field, fields: Mapping[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    import torch

    raw = fields.get(field.name)
    if raw is None or raw.dtype != torch.uint8 or raw.shape != (field.nbytes,) or raw.device != device:
        found = "nothing" if raw is None else f"{raw.dtype} {tuple(raw.shape)} on {raw.device}"
        raise CodegenError(f"field {field.name!r}: found {found}, expected torch.uint8 ({field.nbytes},) on {device}")
    dtype = (
        torch.int32
        if field.dtype[0] == "u"
        else {"f16": torch.float16, "f32": torch.float32, "i8": torch.int8}[field.dtype]
    )
    whole = (
        raw if raw.is_contiguous() and raw.data_ptr() % 16 == 0 else raw.clone(memory_format=torch.contiguous_format)
    )
    return whole.view(dtype)


def _check_call(x: torch.Tensor, y: torch.Tensor, rows: int, cols: int, bias: torch.Tensor | None) -> None:
    """Raise CodegenError unless x, y and bias fit a matrix [rows, cols]."""
    import torch

    if x.ndim == 0 or x.shape[-1] != cols or x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise CodegenError(f"x: found {x.dtype} {tuple(x.shape)}, expected fp16, bf16 or fp32 [..., {cols}]")
    fits = y.shape == (*x.shape[:-1], rows) and y.dtype == x.dtype and y.device == x.device and y.is_contiguous()
    if not fits:
        raise CodegenError(f"out: found {y.dtype} {tuple(y.shape)}, expected contiguous {x.dtype} [..., {rows}]")
    if bias is not None and (bias.shape != (rows,) or bias.device != x.device):
        raise CodegenError(f"bias: found {tuple(bias.shape)} on {bias.device}, expected ({rows},) on {x.device}")
