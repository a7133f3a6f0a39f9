"""Running generated kernels: y = W_hat x on the device that holds the fields.

The source that runs is always the one the installed package generates from the format, kept in the user's cache and
compiled by Triton on first use. Code that came with an artifact is never executed; `check_sources` only compares it.
With TRITON_INTERPRET=1, set before Triton is imported, the same calls run on the CPU.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from reallm.codegen.ir.operations import LIFT, AddLowRank, AddSparse, CodegenError, Store, Trellis
from reallm.codegen.ir.program import KernelSpec, MatrixProgram, Program, Tile, lower
from reallm.codegen.passes.run import dense_kernel, run_passes
from reallm.codegen.triton.emit import bindings, constants, emit, pointers
from reallm.codegen.triton.trellis import WARP, kernel_widths
from reallm.kernels.formats.codecs import TILE, Field
from reallm.kernels.formats.formats import Format
from reallm.kernels.storage.atomic import write_text_atomic

from .constant_tables import tables
from .derived_tensors import Derived, derive

if TYPE_CHECKING:
    import torch

MAX_BATCH = 4
"""Rows of x one instance of a GEMV takes; more of them become more instances, or a GEMM."""
GEMM_BATCHES = (16, 32, 64)
"""Rows of x that an instance of a GEMM may take."""
DENSE_ROWS = 32
"""With more rows of x the values are decoded to memory for the time of a product, by a library."""
DENSE_SPLITS = 16
"""Instances that share out the columns of a trellis that is decoded to memory."""
WANTED_WARPS = 2048
"""Of a trellis product: about fifteen for each multiprocessor."""
SPLITS = (8, 4, 2, 1)
"""Instances that may share out the columns of a product."""


@cache
def kernels_for(
    fmt: Format, rows: int, cols: int, bias: bool = False, tile: Tile | None = None, prefill: bool = False
) -> tuple[KernelSpec, ...]:
    """The kernels, in order, that compute y = W_hat x for a matrix [rows, cols] stored as `fmt`.

    `tile` replaces the one of `passes.choose_tiles`; `prefill` asks for the GEMM. Raises CodegenError for a format
    without kernels.
    """
    operations = lower(fmt, bias, prefill)
    program = Program((MatrixProgram("matrix", rows, cols, fmt, operations, tile, prefill=prefill),))
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


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix W[rows, cols] as `multiply` takes it."""

    format: Format
    fields: Mapping[str, torch.Tensor]
    rows: int
    cols: int
    bias: torch.Tensor | None = None
    derived: Derived | None = None


@dataclass
class Call:
    """One product under way: what its kernels read and write, by name."""

    rows: int
    cols: int
    tensors: dict[str, torch.Tensor]
    rank: int
    widths: tuple[int, ...]
    splits: int = 1
    filled: bool = True
    """Whether every block of a trellis has bits."""
    kept: dict[Any, Any] = field(default_factory=dict)
    """What other products of the same x may use."""

    @property
    def count(self) -> int:
        return self.tensors["x"].shape[0]

    def new(self, *shape: int) -> torch.Tensor:
        return self.tensors["x"].new_empty(shape, dtype=_float32())


def multiply(
    fmt: Format,
    fields: Mapping[str, torch.Tensor],
    x: torch.Tensor,
    rows: int,
    cols: int,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    tile: Tile | None = None,
    derived: Derived | None = None,
    prefill: bool | None = None,
) -> torch.Tensor:
    """y = x W_hat^T (+ bias) with generated kernels: [..., rows] in the dtype of x [..., cols], summed in float32.

    `fields` holds each of `fmt.fields(rows, cols)` (and a shared codebook under its field's name) as uint8
    [field.nbytes] on the device of x. `out`, contiguous and of the result's shape, is filled if given; `derived` is
    what `derive` made of the same fields before; `tile` and `prefill` are for tuning. Raises CodegenError on a wrong
    shape, dtype or device, and for a format without kernels.
    """
    import torch

    y = torch.empty((*x.shape[:-1], rows), dtype=x.dtype, device=x.device) if out is None else out
    call = start(StoredMatrix(fmt, fields, rows, cols, bias, derived), x, y)
    if not call.count:
        return y
    many = call.count > MAX_BATCH if prefill is None else prefill
    kernels = kernels_for(fmt, rows, cols, bias is not None, tile, many)
    apart = call.count > DENSE_ROWS and prefill is None and tile is None and _is_apart(kernels[-1], x)
    with on_device(x):
        for spec in kernels:
            if apart and spec.function == "gemm":
                _multiply_dense(spec, call, dense_kernel(fmt, cols))
            else:
                run(spec, [call], many)
    return y


def _is_apart(last: KernelSpec, x: torch.Tensor) -> bool:
    """Whether the product can be a library's: something else finishes it, or there is nothing to finish but a bias."""
    import torch

    kinds = {type(operation) for operation in last.operations}
    if x.is_cuda and not hasattr(torch.ops.aten.mm, "dtype"):  # sums in float32 of torch 2.8 and later
        return False
    return last.function == "finish" or (x.dtype != torch.float32 and not kinds & {AddLowRank, AddSparse})


def _multiply_dense(spec: KernelSpec, call: Call, dense: KernelSpec) -> None:
    """What the GEMM `spec` makes, by decoding all values with the kernel `dense` and torch's product."""
    import torch

    tensors, lifted = call.tensors, any(isinstance(operation, Trellis) for operation in dense.operations)
    finished = isinstance(spec.operations[-1], Store)
    dtype = tensors["x"].dtype if finished else torch.float16
    make = torch.empty if call.filled else torch.zeros
    tensors["dense"] = make(call.rows, call.cols, dtype=dtype, device=tensors["x"].device)
    run(dense, [call], many=True)
    weights = tensors.pop("dense")
    if finished:
        y = tensors["y"].view(-1, call.rows)
        y.copy_(torch.nn.functional.linear(tensors["x"], weights, tensors.get("bias")))
        return
    inputs = (tensors["ready"][:, : call.cols] * (2.0**-LIFT if lifted else 1.0)).half()
    if inputs.is_cuda:
        part = torch.mm(inputs, weights.T, out_dtype=torch.float32)
    else:  # in the interpreter: torch has no such product on a CPU
        part = inputs.float() @ weights.float().T
    if lifted:
        part *= tensors["index"][:1].view(torch.float32)
    tensors["part"], call.splits = part[None], 1


def start(matrix: StoredMatrix, x: torch.Tensor, y: torch.Tensor) -> Call:
    """A product that nothing was launched for yet. Raises CodegenError as `multiply`."""
    fmt, rows, cols = matrix.format, matrix.rows, matrix.cols
    _check_call(x, y, rows, cols, matrix.bias)
    flat = x.reshape(-1, cols).contiguous()
    flat = flat.clone() if flat.data_ptr() % 16 else flat  # kernels load eight bytes at once
    tensors = {"x": flat, "y": y, **_views(fmt, matrix.fields, rows, cols, x.device)}
    if matrix.bias is not None:
        tensors["bias"] = matrix.bias.to(x.dtype).contiguous()
    found = derive(fmt, matrix.fields, rows, cols) if matrix.derived is None else matrix.derived
    rank = fmt.low_rank.rank if fmt.low_rank else 0
    kept = input_cache(x)
    return Call(rows, cols, tensors | found.tensors, rank, found.widths, filled=found.filled, kept=kept)


def on_device(x: torch.Tensor) -> AbstractContextManager[Any]:
    """What makes x's device the one that kernels are launched on."""
    import torch

    return torch.cuda.device(x.device.index if x.is_cuda else -1)


def input_cache(x: torch.Tensor) -> dict[Any, Any]:
    """What earlier products made of the same tensor and other matrices can use: it lives as long as x, unchanged.

    A rotation of q, k and v's shared input is thus made once.
    """
    if x.is_inference():
        return {}  # its changes are not counted
    version, kept = getattr(x, "_reallm_kept", (None, {}))
    if version != x._version:
        kept = {}
        x._reallm_kept = (x._version, kept)  # type: ignore[attr-defined]
    return kept


def run(spec: KernelSpec, calls: Sequence[Call], many: bool) -> None:
    """Launch one kernel over all rows of x, for the product of each of its matrices; what later kernels read is left
    among the products' tensors."""
    lead, total = calls[0], sum(call.rows for call in calls)
    tensors, count = lead.tensors, lead.count
    for call in calls:
        call.tensors |= tables(spec, call.rows, call.cols, tensors["x"].device)
    rows = [call.rows for call in calls]
    grid: tuple[int, ...]
    sizes: tuple[int, ...]
    match spec.function:
        case "dense":
            spec = _for_batch(spec, calls, many=True)
            down, splits = -(-lead.rows // spec.tile.block_n), DENSE_SPLITS if spec.widths else 1
            grid, sizes = (down, 1, splits), (count, *rows, lead.cols)
        case "project":
            tensors["t"] = lead.new(count, lead.rank)
            grid, sizes = (count, lead.rank), (lead.rank, lead.cols)
        case "prepare":
            if _take_prepared(spec, lead):
                return
            shares, pieces = _shares(spec, lead.cols)
            grid, sizes = (count, shares), (lead.cols, pieces)
        case "finish":
            shared = [_shares(spec, order) for order in rows]
            grid = (count, sum(shares for shares, _ in shared))
            sizes = (count, *rows, lead.cols, *(pieces for _, pieces in shared))
        case _:
            spec = _for_batch(spec, calls, many)
            down, across = sum(-(-order // spec.tile.block_n) for order in rows), -(-count // spec.batch)
            splits = splits_for(spec, total, lead.cols, count)
            if any(name == "part" for _, _, name, _ in bindings(spec)):
                for call in calls:
                    call.splits, call.tensors["part"] = splits, call.new(splits, count, call.rows)
            grid, sizes = (down, across, splits), (count, *rows, lead.cols)
    arguments = [calls[member].tensors[name] for _, _, name, member in bindings(spec)]
    known = {"DEVICE": device_path(tensors["x"].device), "SPLITS": lead.splits}
    options = {name: known[name] for name in constants(spec)}
    load_kernel(spec)[grid](*arguments, *sizes, **options, num_warps=spec.tile.num_warps, enable_fp_fusion=True)


def device_path(device: torch.device) -> str:
    """What DEVICE is on `device`; "portable" where there is no assembler, as in the interpreter."""
    import torch

    return "portable" if device.type != "cuda" else "hip" if torch.version.hip else "cuda"


def _shares(spec: KernelSpec, order: int) -> tuple[int, int]:
    """(instances that share out a vector of `order` entries, pieces of its rotation)."""
    if any(name.startswith("base") for name, _ in pointers(spec)):
        pieces = order // spec.tile.block_k
        return -(-pieces // spec.tile.block_n), pieces
    padded = -(-order // TILE) * TILE if spec.function == "prepare" else order
    return -(-padded // spec.tile.block_k), 1


def _take_prepared(spec: KernelSpec, call: Call) -> bool:
    """Whether x' of another product of the same x serves; makes room for it otherwise."""
    shared = not any(operation.reads for operation in spec.operations)
    if shared and (spec, "ready") in call.kept:
        call.tensors |= {name: call.kept[spec, name] for name in ("ready", "norms")}
        return True
    call.tensors["ready"] = call.new(call.count, -(-call.cols // TILE) * TILE)
    call.tensors["norms"] = call.new(call.count)
    if shared:
        call.kept.update({(spec, name): call.tensors[name] for name in ("ready", "norms")})
    return False


def _for_batch(spec: KernelSpec, calls: Sequence[Call], many: bool) -> KernelSpec:
    """The specification for this many rows of x, and for the widths of these trellises."""
    limits = GEMM_BATCHES if many else range(1, MAX_BATCH + 1)
    batch = next((limit for limit in limits if limit >= calls[0].count), limits[-1])
    widths = {width for call in calls for width in call.widths}
    if isinstance(trellis := spec.operations[0], Trellis):
        spec = replace(spec, widths=kernel_widths(widths, trellis.state_bits))
    if spec.function == "dense":
        return spec
    return with_batch(spec, batch)


def with_batch(spec: KernelSpec, batch: int) -> KernelSpec:
    """The specification for `batch` rows of x an instance: of a trellis with as many sums in a thread as with one, or
    its registers do not hold them."""
    tile = spec.tile
    if spec.widths and spec.function == "gemv":
        tile = replace(tile, block_n=max(WARP, tile.block_n // (1 << (batch - 1).bit_length())))
    return replace(spec, batch=batch, tile=tile)


def splits_for(spec: KernelSpec, rows: int, cols: int, count: int) -> int:
    """How many instances share out the columns of a product with `count` rows of x; one where nothing adds parts up."""
    if not spec.widths:
        return 1
    instances = -(-rows // spec.tile.block_n) * -(-count // spec.batch)
    warps = spec.tile.num_warps
    together = warps if spec.function == "gemv" else 1  # blocks of columns that an instance takes at once
    most = min(WANTED_WARPS // (instances * warps), -(-cols // TILE) // together)
    return next((splits for splits in SPLITS if splits <= most), 1)


def _float32() -> torch.dtype:
    import torch

    return torch.float32


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
