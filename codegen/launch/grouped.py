"""Products of several matrices with one x: those that `passes.group_products` finds alike are one launch.

The programs here contain only the matrices that share an input, named by the last part of their names, so that all
layers of a model use the same programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from reallm.codegen.ir.lower import has_kernel, lower
from reallm.codegen.ir.operations import CodegenError, Reuse
from reallm.codegen.ir.program import MatrixProgram, Program
from reallm.codegen.passes.run import run_passes
from reallm.kernels.formats.formats import Format

from .bindings import ProductCall, StoredMatrix, begin_product
from .instances import MAX_BATCH
from .launch import launch_kernel, on_device

if TYPE_CHECKING:
    import torch


MAX_ROWS = 32
"""Most rows of x in a grouped launch. With more, one product is work enough for a launch, and the pointers of a group's
GEMM cost registers (152 for 64 rows of x an instance, where one matrix takes 128)."""


@dataclass(frozen=True)
class Member:
    """What a program depends on of one matrix; `name` is one of `dataflow.SAME_INPUT`."""

    name: str
    format: Format
    rows: int
    cols: int
    biased: bool


@cache
def program_of(members: tuple[Member, ...], prefill: bool) -> Program:
    """The program, after the passes, of those matrices of one input that have kernels."""
    return run_passes(
        Program(
            tuple(
                MatrixProgram(m.name, m.rows, m.cols, m.format, lower(m.format, m.biased, prefill), prefill=prefill)
                for m in members
                if has_kernel(m.format)
            )
        )
    )


@cache
def group_of_leader(members: tuple[Member, ...], leader: str) -> tuple[Member, ...]:
    """The members whose products one launch computes when `leader` is called; empty unless it leads a group."""
    groups = [group.matrices for group in program_of(members, prefill=False).groups]
    names = next((names for names in groups if names[0] == leader), ())
    return tuple(member for member in members if member.name in names)


def multiply_group(
    members: Sequence[Member], matrices: Sequence[StoredMatrix], x: torch.Tensor, prefill: bool | None = None
) -> list[torch.Tensor]:
    """y = x W_hat^T (+ bias) of each matrix, [..., rows] in the dtype of x [..., cols], in one launch for all products.

    The results are those of `launch.multiply` except for the order of sums. `members` are all of a `group_of_leader`.
    Raises CodegenError for members that are not one group, for more than MAX_ROWS rows of x, and as `launch.multiply`.
    """
    import torch

    outputs = [torch.empty((*x.shape[:-1], m.rows), dtype=x.dtype, device=x.device) for m in matrices]
    calls = {m.name: begin_product(matrix, x, y) for m, matrix, y in zip(members, matrices, outputs, strict=True)}
    count = next(iter(calls.values())).count
    if not count:
        return outputs
    if count > MAX_ROWS:
        raise CodegenError(f"x has {count} rows; a grouped product takes at most {MAX_ROWS}: multiply one by one")
    many = count > MAX_BATCH if prefill is None else prefill
    program = program_of(tuple(members), many)
    if not program.groups or len(program.groups[0].matrices) != len(members):
        raise CodegenError(f"{', '.join(calls)} have no product in common; multiply them one by one")
    with on_device(x):
        _launch_program(program, calls, many)
    return outputs


def _launch_program(program: Program, calls: dict[str, ProductCall], many: bool) -> None:
    """Launch what comes before the products, the groups, and what finishes matrices outside of a group."""
    for matrix in program.matrices:
        for spec in matrix.kernels:
            if spec.function in ("project", "prepare"):
                launch_kernel(spec, [calls[matrix.name]], many)
        for operation in matrix.operations:
            if isinstance(operation, Reuse):
                prepared = calls[operation.leader].tensors
                calls[matrix.name].tensors |= {name: prepared[name] for name in ("ready", "norms")}
    for group in program.groups:
        launch_kernel(group.kernel, [calls[name] for name in group.matrices], many)
    finished = {name for group in program.groups[1:] for name in group.matrices}
    for matrix in program.matrices:
        if (finish := matrix.kernel("finish")) and matrix.name not in finished:
            launch_kernel(finish, [calls[matrix.name]], many)
