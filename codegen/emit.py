"""Emission: the Triton source of one kernel, a self-contained file whose text depends on the specification alone.

Tile of a GEMV: W as [BLOCK_N, CHUNKS, WIDTH], WIDTH the columns of one word of the widest plane (16 of 2 or 3 bits, 8
of 4 to 6, 4 of 8) or of one additive group. When rows are whole chunks, every plane's bits of a chunk lie in one word:
words, scales and zeros are loaded once for each chunk and only shifts are done for each weight. Otherwise each weight
finds its own word. Layout of the words: `reallm.kernels.packing`; of the fields: `reallm.kernels.formats`.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from string import Template

from .gemv import GemvWriter
from .operations import AddBias, AddLowRank, Levels, Unpack
from .program import KernelSpec, chunk_width
from .snippets import indent


def pointers(spec: KernelSpec) -> tuple[tuple[str, str], ...]:
    """The kernel's tensors in the order of its arguments, and the dtype each points to ("x": that of x)."""
    reads = [pair for operation in spec.operations for pair in operation.reads]
    if spec.function == "project":
        return (("x", "x"), ("t", "f32"), *reads)
    extra = []
    for operation in spec.operations:
        if isinstance(operation, Levels) and operation.table != "int":
            extra.append(("levels", "f32"))
        elif isinstance(operation, AddLowRank):
            extra.append(("t", "f32"))
        elif isinstance(operation, AddBias):
            extra.append(("bias", "x"))
    return (("x", "x"), ("y", "x"), *reads, *extra)


def scalars(spec: KernelSpec) -> tuple[str, ...]:
    """The kernel's whole-number arguments, behind the tensors."""
    return ("rank", "cols") if spec.function == "project" else ("batch", "rows", "cols")


@cache
def emit(spec: KernelSpec) -> str:
    """Triton source of `spec`, the same text for the same specification on every machine."""
    return _emit_project(spec) if spec.function == "project" else _emit_gemv(spec)


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
        scale="".join(scales),
    )


def _emit_gemv(spec: KernelSpec) -> str:
    width = chunk_width(next(operation for operation in spec.operations if isinstance(operation, Unpack)))
    writer = GemvWriter(spec, width)
    for operation in spec.operations:
        writer.write(operation)
    return _template("gemv.txt").substitute(
        name=spec.name,
        listing=indent([f"{operation.gives:<7}= {operation}" for operation in spec.operations], 4),
        arguments=", ".join(name for name, _ in pointers(spec)),
        block_n=spec.tile.block_n,
        block_k=spec.tile.block_k,
        chunks=spec.tile.block_k // width,
        width=width,
        batch=spec.batch,
        setup=indent(writer.setup, 4),
        body=indent(writer.body, 8),
        tail=indent(writer.tail, 4),
    )
