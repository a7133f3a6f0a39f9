"""Running generated kernels: y = W_hat x on the device that holds the fields.

The source that runs is always the one that the installed package generates from the format, compiled by Triton on first
use. Code that came with an artifact is never executed; `artifact.check_sources` only compares it. With
TRITON_INTERPRET=1, set before Triton is imported, the same calls run on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from reallm.codegen.ir.lower import lower
from reallm.codegen.ir.operations import LIFT, AddLowRank, AddSparse, Store, Trellis
from reallm.codegen.ir.program import Function, KernelSpec, MatrixProgram, Program, Tile
from reallm.codegen.passes.kernel_specs import dense_kernel
from reallm.codegen.passes.run import run_passes
from reallm.codegen.triton.emit import bindings, constants
from reallm.kernels.formats.codecs import TILE
from reallm.kernels.formats.formats import Format

from .bindings import ProductCall, StoredMatrix, begin_product
from .constant_tables import constant_tables
from .derived_tensors import Derived
from .instances import MAX_BATCH, for_calls, splits_for, vector_instances
from .source_cache import load_kernel

if TYPE_CHECKING:
    import torch

DENSE_ROWS = 32
"""With more rows of x than this, the values are decoded to memory and a library computes the product."""
DENSE_SPLITS = 16
"""Number of instances among which the columns are divided when a trellis is decoded to memory."""


@cache
def kernels_for(
    fmt: Format, rows: int, cols: int, bias: bool = False, tile: Tile | None = None, prefill: bool = False
) -> tuple[KernelSpec, ...]:
    """The kernels, in order, that compute y = W_hat x for a matrix [rows, cols] stored as `fmt`.

    `tile` replaces the choice of `passes.choose_tiles`; `prefill` selects the GEMM. Raises CodegenError for a format
    without kernels.
    """
    operations = lower(fmt, bias, prefill)
    program = Program((MatrixProgram("matrix", rows, cols, fmt, operations, tile, prefill=prefill),))
    return run_passes(program).matrices[0].kernels


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
    [field.nbytes] on the device of x. If given, `out` (contiguous, of the result's shape) receives the result, and
    `derived` is an earlier result of `derive` for the same fields. `tile` and `prefill` are for tuning. Raises
    CodegenError on a wrong shape, dtype or device, and for a format without kernels.
    """
    import torch

    y = torch.empty((*x.shape[:-1], rows), dtype=x.dtype, device=x.device) if out is None else out
    call = begin_product(StoredMatrix(fmt, fields, rows, cols, bias, derived), x, y)
    if not call.count:
        return y
    many = call.count > MAX_BATCH if prefill is None else prefill
    kernels = kernels_for(fmt, rows, cols, bias is not None, tile, many)
    by_library = call.count > DENSE_ROWS and prefill is None and tile is None and _library_can_multiply(kernels[-1], x)
    with on_device(x):
        for spec in kernels:
            if by_library and spec.function == "gemm":
                _multiply_dense(spec, call, dense_kernel(fmt, cols))
            else:
                launch_kernel(spec, [call], many)
    return y


def _library_can_multiply(last: KernelSpec, x: torch.Tensor) -> bool:
    """Whether a library GEMM may compute the product whose last kernel is `last`.

    It may if a `finish` kernel follows the product, or if x is not float32 and at most a bias is added to the product;
    but never on a GPU with torch before 2.8.
    """
    import torch

    kinds = {type(operation) for operation in last.operations}
    if x.is_cuda and not hasattr(torch.ops.aten.mm, "dtype"):  # before torch 2.8: no float32 output of half inputs
        return False
    return last.function == "finish" or (x.dtype != torch.float32 and not kinds & {AddLowRank, AddSparse})


def _multiply_dense(spec: KernelSpec, call: ProductCall, dense: KernelSpec) -> None:
    """Do the work of the GEMM `spec` by decoding all values with the kernel `dense` and multiplying with torch."""
    import torch

    tensors, lifted = call.tensors, any(isinstance(operation, Trellis) for operation in dense.operations)
    finished = isinstance(spec.operations[-1], Store)
    dtype = tensors["x"].dtype if finished else torch.float16
    make = torch.empty if call.filled else torch.zeros
    tensors["dense"] = make(call.rows, call.cols, dtype=dtype, device=tensors["x"].device)
    launch_kernel(dense, [call], many=True)
    weights = tensors.pop("dense")
    if finished:
        y = tensors["y"].view(-1, call.rows)
        y.copy_(torch.nn.functional.linear(tensors["x"], weights, tensors.get("bias")))
        return
    inputs = (tensors["ready"][:, : call.cols] * (2.0**-LIFT if lifted else 1.0)).half()
    if inputs.is_cuda:
        part = torch.mm(inputs, weights.T, out_dtype=torch.float32)
    else:  # in Triton's interpreter: on a CPU, torch has no half-precision product with float32 output
        part = inputs.float() @ weights.float().T
    if lifted:
        part *= tensors["index"][:1].view(torch.float32)
    tensors["part"], call.splits = part[None], 1


def on_device(x: torch.Tensor) -> AbstractContextManager[Any]:
    """A context in which kernels are launched on the device of x."""
    import torch

    return torch.cuda.device(x.device.index if x.is_cuda else -1)


def device_path(device: torch.device) -> str:
    """The kernel argument DEVICE for `device`; "portable" off GPUs: Triton's interpreter has no inline assembly."""
    import torch

    return "portable" if device.type != "cuda" else "hip" if torch.version.hip else "cuda"


@dataclass(frozen=True)
class _Launch:
    """A kernel's specification for one launch, its grid and its integer arguments."""

    spec: KernelSpec
    grid: tuple[int, ...]
    sizes: tuple[int, ...]


def launch_kernel(spec: KernelSpec, calls: Sequence[ProductCall], many: bool) -> None:
    """Launch one kernel for all rows of x and all `calls`, which have the same x.

    The tensors that the kernel writes are added to the tensors of the calls, where later kernels find them.
    """
    first = calls[0]
    device = first.tensors["x"].device
    for call in calls:
        call.tensors |= constant_tables(spec, call.rows, call.cols, device)
    launch = _PLANS[spec.function](spec, calls, many)
    if launch is None:
        return
    spec = launch.spec
    arguments = [calls[member].tensors[name] for _, _, name, member in bindings(spec)]
    values = {"DEVICE": device_path(device), "SPLITS": first.splits}
    options = {name: values[name] for name in constants(spec)}
    kernel = load_kernel(spec)
    kernel[launch.grid](*arguments, *launch.sizes, **options, num_warps=spec.tile.num_warps, enable_fp_fusion=True)


def _plan_dense(spec: KernelSpec, calls: Sequence[ProductCall], many: bool) -> _Launch:
    spec, call = for_calls(spec, calls, many), calls[0]
    down, splits = -(-call.rows // spec.tile.block_n), DENSE_SPLITS if spec.widths else 1
    return _Launch(spec, (down, 1, splits), (call.count, call.rows, call.cols))


def _plan_project(spec: KernelSpec, calls: Sequence[ProductCall], many: bool) -> _Launch:
    call = calls[0]
    call.tensors["t"] = call.new(call.count, call.rank)
    return _Launch(spec, (call.count, call.rank), (call.rank, call.cols))


def _plan_prepare(spec: KernelSpec, calls: Sequence[ProductCall], many: bool) -> _Launch | None:
    """The launch that computes x', or None if x' of another product with the same x can be used."""
    call = calls[0]
    can_share = not any(operation.reads for operation in spec.operations)
    if can_share and (spec, "ready") in call.shared:
        call.tensors |= {name: call.shared[spec, name] for name in ("ready", "norms")}
        return None
    call.tensors["ready"] = call.new(call.count, -(-call.cols // TILE) * TILE)
    call.tensors["norms"] = call.new(call.count)
    if can_share:
        call.shared.update({(spec, name): call.tensors[name] for name in ("ready", "norms")})
    instances, pieces = vector_instances(spec, call.cols)
    return _Launch(spec, (call.count, instances), (call.cols, pieces))


def _plan_finish(spec: KernelSpec, calls: Sequence[ProductCall], many: bool) -> _Launch:
    first, rows = calls[0], [call.rows for call in calls]
    vectors = [vector_instances(spec, order) for order in rows]
    grid = (first.count, sum(instances for instances, _ in vectors))
    return _Launch(spec, grid, (first.count, *rows, first.cols, *(pieces for _, pieces in vectors)))


def _plan_product(spec: KernelSpec, calls: Sequence[ProductCall], many: bool) -> _Launch:
    spec, first, rows = for_calls(spec, calls, many), calls[0], [call.rows for call in calls]
    down, across = sum(-(-order // spec.tile.block_n) for order in rows), -(-first.count // spec.batch)
    splits = splits_for(spec, sum(rows), first.cols, first.count)
    if any(name == "part" for _, _, name, _ in bindings(spec)):
        for call in calls:
            call.splits, call.tensors["part"] = splits, call.new(splits, call.count, call.rows)
    return _Launch(spec, (down, across, splits), (first.count, *rows, first.cols))


_PLANS: Mapping[Function, Callable[[KernelSpec, Sequence[ProductCall], bool], _Launch | None]] = {
    "dense": _plan_dense,
    "project": _plan_project,
    "prepare": _plan_prepare,
    "finish": _plan_finish,
    "gemm": _plan_product,
    "gemv": _plan_product,
}
"""For each kind of kernel, the function that allocates what the kernel writes, and chooses its grid."""
