"""The Triton source of one kernel: a self-contained file whose text depends on the specification alone.

The tile of a GEMV is W as [BLOCK_N, CHUNKS, WIDTH], where WIDTH is the number of columns in one word of the widest
plane (16 for codes of 2 or 3 bits, 8 for 4 to 6 bits, 4 for 8 bits) or in one additive group. When a row is a whole
number of chunks, the bits of a chunk lie in one word of each plane: words, scales and zeros are loaded once per chunk,
and each weight takes only shifts. Otherwise the word of each weight is loaded separately. The layout of the words is
described in `kernels.formats.bit_planes`, that of the fields in `kernels.formats.codecs`.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from string import Template

from reallm.codegen.ir.operations import (
    AddBias,
    AddLowRank,
    AddSparse,
    Dot,
    Lattice,
    Levels,
    Operation,
    Prepare,
    Project,
    Store,
    Trellis,
    Unpack,
    Unrotate,
)
from reallm.codegen.ir.program import KernelSpec

from .gemm import GemmWriter
from .gemv import GemvWriter
from .group_select import MEMBER_SIZES, MEMBER_TENSORS, member_name, select_lines, tile_index
from .prepare_finish import emit_finish, emit_prepare
from .scalar_spans import FOUR, SpanWriter
from .snippets import code_lines, indent, planes
from .trellis import BYTE_SUM, emit_trellis

Pointers = tuple[tuple[str, str], ...]
DERIVED = {"widths": ("index", "i32"), "sparse_counts": ("sparse_offsets", "i32")}
"""Stored field -> the tensor that kernels read in its place; see `launch.derived_tensors`."""


def pointers(spec: KernelSpec) -> Pointers:
    """The (name, dtype) of each tensor argument of the kernel, in order; the dtype "x" means the dtype of x."""
    return tuple((argument, dtype) for argument, dtype, _, _ in bindings(spec))


def bindings(spec: KernelSpec) -> tuple[tuple[str, str, str, int], ...]:
    """For each tensor argument: (its name, dtype, name of the tensor, number of the tensor's matrix in the group)."""
    plain = _pointers_of_one(spec)
    if spec.members == 1:
        return tuple((name, dtype, name, 0) for name, dtype in plain)
    separate, members = member_tensors(spec), range(spec.members)
    shared = ((name, dtype, name, 0) for name, dtype in plain if name not in separate)
    owned = ((member_name(name, i), dtype, name, i) for i in members for name, dtype in plain if name in separate)
    return (*shared, *owned)


def member_tensors(spec: KernelSpec) -> tuple[str, ...]:
    """Names of the tensors that every matrix of a group has for itself, in the order of a single matrix's arguments."""
    read = {DERIVED.get(name, (name, dtype)) for operation in spec.operations for name, dtype in operation.reads}
    return tuple(name for name, dtype in _pointers_of_one(spec) if name in MEMBER_TENSORS or (name, dtype) in read)


def _pointers_of_one(spec: KernelSpec) -> Pointers:
    reads = [DERIVED.get(name, (name, dtype)) for op in spec.operations for name, dtype in op.reads]
    extra = [pair for operation in spec.operations for pair in _extra(operation)]
    if spec.function == "project":
        return (("x", "x"), ("t", "f32"), *reads)
    if spec.function == "prepare":
        return (("x", "x"), ("ready", "f32"), ("norms", "f32"), *reads, *extra)
    if spec.function == "finish":
        return (("part", "f32"), ("y", "x"), *reads, *extra)
    if spec.function == "dense":
        return (("dense", "x"), *reads, *extra)
    ends = (("x", "x"), ("y", "x")) if isinstance(spec.operations[-1], Store) else (("ready", "f32"), ("part", "f32"))
    return (*ends, *reads, *(pair for pair in extra if pair not in ends))


def _extra(operation: Operation) -> Pointers:
    """The (name, dtype) of each tensor that an operation reads and that is not a stored field."""
    match operation:
        case Levels(table) if table != "int":
            return (("levels", "f32"),)
        case Lattice(bits):
            return (("grid", "f32"), ("roots", "f32")) if bits == 3 else (("grid", "f32"),)
        case Prepare(rotated=True):
            return (("base_in", "f32"), ("signs_in", "f32"))
        case Unrotate(rotated):
            return (("norms", "f32"), *((("base_out", "f32"), ("signs_out", "f32")) if rotated else ()))
        case AddSparse():
            return (("x", "x"),)
        case AddLowRank():
            return (("t", "f32"),)
        case AddBias():
            return (("bias", "x"),)
    return ()


def scalars(spec: KernelSpec) -> tuple[str, ...]:
    """Names of the kernel's integer arguments, which follow the tensors."""
    plain = _scalars_of_one(spec)
    if spec.members == 1:
        return plain
    return tuple(
        argument
        for name in plain
        for argument in ([member_name(name, i) for i in range(spec.members)] if name in MEMBER_SIZES else [name])
    )


def _scalars_of_one(spec: KernelSpec) -> tuple[str, ...]:
    special = {
        "project": ("rank", "cols"),
        "prepare": ("cols", "pieces"),
        "finish": ("batch", "rows", "cols", "pieces"),
    }
    return special.get(spec.function, ("batch", "rows", "cols"))


def constants(spec: KernelSpec) -> tuple[str, ...]:
    """Names of the kernel's compile-time arguments, which come last.

    DEVICE is "cuda", "hip" or "portable"; SPLITS is the number of instances among which the columns of a product were
    divided, and thus the number of partial sums that `finish` adds up.
    """
    if spec.function == "finish":
        return ("SPLITS",)
    return ("DEVICE",) if any(isinstance(operation, Trellis) for operation in spec.operations) else ()


@cache
def emit(spec: KernelSpec) -> str:
    """The Triton source of `spec`, the same text for the same specification on every machine."""
    first = spec.operations[0]
    if spec.function == "project":
        return _emit_project(spec)
    if isinstance(first, Trellis):
        return _head(spec) + BYTE_SUM + "\n\n" + _signature(spec) + "\n" + emit_trellis(spec, _select(spec))
    if isinstance(first, Prepare):
        return _head(spec) + _signature(spec) + "\n" + emit_prepare(spec, first)
    if spec.function == "finish":
        return _head(spec) + _signature(spec) + "\n" + emit_finish(spec, _select(spec))
    return _emit_spans(spec) if spec.span and spec.function == "gemv" else _emit_gemv(spec)


def _signature(spec: KernelSpec) -> str:
    """The decorator and the first line of a kernel's function."""
    counted = scalars(spec)
    unspecialised = ", ".join(f'"{name}"' for name in counted)
    fixed = [f"{name}: tl.constexpr" for name in constants(spec)]
    arguments = ", ".join([*(name for name, _ in pointers(spec)), *counted, *fixed])
    return f"@triton.jit(do_not_specialize=[{unspecialised}])\ndef {spec.function}({arguments}):"


def _select(spec: KernelSpec) -> list[str]:
    """Lines with which an instance selects the arguments of its matrix."""
    return select_lines(
        spec, [*member_tensors(spec), *(name for name in _scalars_of_one(spec) if name in MEMBER_SIZES)]
    )


def _start_lines(spec: KernelSpec) -> list[str]:
    """The first lines in the body of a product that is written from a template."""
    block = spec.tile.block_n
    return [*_select(spec), f"n = {tile_index(spec)} * {block} + tl.arange(0, {block})"]


def _listing(spec: KernelSpec) -> str:
    return indent([f"{operation.gives:<7}= {operation}" for operation in spec.operations], 4)


def _head(spec: KernelSpec) -> str:
    """The text before a kernel's function: a docstring that says what it computes, and the imports."""
    meaning = {
        "prepare": "x' of the transformed matrix",
        "finish": "y of the parts of a transformed product",
        "gemv": "part[s, m, n] = sum_k ready[m, k] C[n, k], for few rows of x",
        "gemm": "part[s, m, n] = sum_k ready[m, k] C[n, k], for many rows of x",
        "dense": "dense[n, k], the values of C for a library's product",
    }
    return (
        f'"""{spec.name}: {meaning[spec.function]}, generated by reallm; do not edit.\n\n{_listing(spec)}\n"""\n\n'
        "import triton\nimport triton.language as tl\n\n\n"
    )


@cache
def _template(name: str) -> Template:
    return Template((files("reallm.kernels") / "templates" / name).read_text(encoding="utf-8"))


def _emit_project(spec: KernelSpec) -> str:
    names = [name for name, _ in pointers(spec)]
    scales = [f" * tl.load({name} + component).to(tl.float32)" for name in names if name.endswith("_scales")]
    return _template("project.txt").substitute(
        name=spec.name,
        arguments=", ".join(names),
        block_k=spec.tile.block_k,
        setup="    cols = cols // 8 * 8  # as it is: says that rows start on whole vectors" if spec.aligned else "",
        factor=indent(_factor_lines(spec), 8),
        scale="".join(scales),
    )


def _factor_lines(spec: KernelSpec) -> list[str]:
    """Lines that load a block of the factor R."""
    project, mask = spec.operations[0], ", mask=inside, other=0"
    if isinstance(project, Project) and project.dtype == "i4":
        lines = code_lines(planes("right", 4), "factor_at", mask, "factor")
        return ["factor_at = component * cols + k", *lines, "factor = (factor - 8).to(tl.float32)"]
    return [f"factor = tl.load(right + component * cols + k{mask}).to(tl.float32)"]


def _emit_spans(spec: KernelSpec) -> str:
    writer = GemvWriter(spec, spec.span)
    loop = SpanWriter(spec, writer.source, writer.stride)
    loop.write()
    writer.tail = loop.tail()
    end = next(index for index, operation in enumerate(spec.operations) if isinstance(operation, Dot))
    for operation in spec.operations[end + 1 :]:
        writer.write(operation)
    writer.finish()
    return _template("spans.txt").substitute(
        name=spec.name,
        listing=_listing(spec),
        four=FOUR,
        signature=_signature(spec),
        start=indent(_start_lines(spec), 4),
        block_n=spec.tile.block_n,
        block_k=spec.tile.block_k,
        chunks=spec.tile.block_k // spec.span,
        span=spec.span,
        batch=spec.batch,
        live="" if spec.even else "        live = place < spans",
        setup=indent([*writer.setup, *loop.setup], 4),
        body=indent(loop.body, 8),
        tail=indent(writer.tail, 4),
    )


def _emit_gemv(spec: KernelSpec) -> str:
    width = next(operation for operation in spec.operations if isinstance(operation, Unpack)).chunk_width
    writer = GemmWriter(spec, width) if spec.function == "gemm" else GemvWriter(spec, width)
    for operation in spec.operations:
        writer.write(operation)
    writer.finish()
    return _template("gemv.txt").substitute(
        name=spec.name,
        listing=_listing(spec),
        signature=_signature(spec),
        start=indent(_start_lines(spec), 4),
        turns=writer.turns,
        block_n=spec.tile.block_n,
        block_k=spec.tile.block_k,
        chunks=spec.tile.block_k // width,
        width=width,
        batch=spec.batch,
        setup=indent(writer.setup, 4),
        body=indent(writer.body, 8),
        tail=indent(writer.tail, 4),
    )
